"""What may be pruned: every layer says it of itself, and all that prunes, counts or checks reads it here."""

from typing import NamedTuple

from torch import nn

from uvc.layers.compact_block import CompactBlock
from uvc.layers.kinds import prunable
from uvc.layers.other_blocks import seen


def units_of(attn: nn.Module) -> list[list[int]]:
    """The q/k dims of a head of an attention by what goes together, in order."""
    pairs = attn.pairs()
    return [[dim] for dim in range(attn.head_dim)] if pairs is None else pairs.tolist()


class Families(NamedTuple):
    """Per family of a block, the multiple in which its units go, 0 where all stay; the halves that may go."""

    heads: int
    qk: int
    v: int
    neurons: int
    halves: tuple[str, ...] = ("attn", "mlp")


def layers_of(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Attention and MLP of a timm, converted or compacted block, as layers that can leave parts out."""
    block = block.origin if isinstance(block, CompactBlock) else block
    block = seen(block)
    return prunable(block.attn), prunable(block.mlp)


def families_of(attn: nn.Module, mlp: nn.Module) -> Families:
    """What a block with these layers offers."""
    ties, multiples = attn.ties() | mlp.ties(), attn.multiples() | mlp.multiples()
    names = ("heads", "qk", "v", "neurons")
    return Families(*(0 if name in ties else multiples.get(name, 1) for name in names))

"""What may be pruned: every layer says it of itself, and all that prunes, counts or checks reads it here."""

from typing import NamedTuple

from torch import nn

from uvc.layers.compact_block import CompactBlock
from uvc.layers.kinds import prunable


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
    return prunable(block.attn), prunable(block.mlp)


def families_of(attn: nn.Module, mlp: nn.Module) -> Families:
    """What a block with these layers offers."""
    ties = attn.ties() | mlp.ties()
    return Families(*(0 if name in ties else 1 for name in ("heads", "qk", "v", "neurons")))

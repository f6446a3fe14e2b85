"""How large the blocks of a dense model are, and what may be pruned of them."""

import itertools
import operator
from typing import NamedTuple

from torch import nn

from uvc.layers.block import Reads
from uvc.layers.block_kinds import kind_of_block
from uvc.layers.convert import check, is_compacted
from uvc.layers.families import Families, families_of, layers_of
from uvc.layers.inputs import patches_of, prefix_of
from uvc.layers.other_blocks import seen
from uvc.layers.stages import blocks_of


class Size(NamedTuple):
    """How large a block is."""

    heads: int
    head_dim: int
    neurons: int


class Sizes(NamedTuple):
    """How large the blocks of a dense model are, and what may be pruned of them.

    `each`: the size of each block, of which `blocks` are the modules. `layers`: attention and MLP of each, as
    layers that can leave parts out; `families`: their offers. `around`: the parameters of each block's halves
    outside these layers (norm, layer scale); `rest`: those that run whichever half is skipped. `patches`:
    patch tokens of an image that reach the first block, None without an input size; `prefix`: tokens before
    them; `pooled`: of how many of them each block has one left.
    """

    each: tuple[Size, ...]
    blocks: tuple[nn.Module, ...]
    layers: tuple[tuple[nn.Module, nn.Module], ...]
    families: tuple[Families, ...]
    around: tuple[tuple[int, int], ...]
    patches: int | None
    prefix: int
    rest: tuple[int, ...]
    pooled: tuple[int, ...]

    def reads(self, index: int, arriving: float, leaving: float) -> Reads:
        """What a block reads where so many patch tokens reach it, and go on from its attention half."""
        block, tokens = self.blocks[index], (self.prefix + arriving, self.prefix + leaving)
        if (pooled := self.pooled[index]) > 1:
            tokens = (n // pooled for n in tokens)
        return kind_of_block(block).reads(block, *tokens)

    def of_all(self, what: str) -> Size:
        """The size of all blocks; ValueError, saying `what` needs that, where they differ."""
        if len(set(self.each)) > 1:
            raise ValueError(f"{what}: blocks of this model differ in size, of which it knows one alone")
        return self.each[0]


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a timm or converted model, or of the one behind a compacted model; else ValueError."""
    compacted = is_compacted(model)
    if not compacted:
        check(model)
    blocks = tuple(block.origin if compacted else block for block in blocks_of(model))
    layers, strides = tuple(map(layers_of, blocks)), [kind_of_block(b).pools(b) for b in blocks]
    return Sizes(
        each=tuple(Size(attn.num_heads, attn.head_dim, mlp.neurons) for attn, mlp in layers),
        blocks=blocks,
        layers=layers,
        families=tuple(families_of(*pair) for pair in layers),
        around=tuple(map(params_around, blocks)),
        patches=patches_of(model),
        prefix=prefix_of(model),
        rest=tuple(map(params_left, blocks)),
        pooled=tuple(itertools.accumulate(strides[:-1], operator.mul, initial=1)),
    )


def params_around(block: nn.Module) -> tuple[int, int]:
    """Parameters of the attention half and of the MLP half of a block outside these two layers."""
    if hasattr(block := seen(block), "around"):
        return block.around()
    halves, others = {"1": 0, "2": 0}, {"attn", "mlp", *kind_of_block(block).stays(block)}
    for name, parameter in block.named_parameters():
        child = name.split(".")[0]
        if child not in others:
            halves[child[-1]] += parameter.numel()
    return halves["1"], halves["2"]


def params_left(block: nn.Module) -> int:
    """Parameters of a block that run whichever half is skipped."""
    left = [getattr(block, name) for name in kind_of_block(block).stays(block)]
    return sum(parameter.numel() for module in left for parameter in module.parameters())

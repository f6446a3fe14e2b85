"""Blocks of several attentions that read the same tokens, and then several MLPs that do (timm's
ParallelThingsBlock, of "Three things everyone should know about Vision Transformers").

A thing, one attention and one MLP, has an entry of its own in a structure. State_dict keys are timm's.
B batch, N tokens, D width.
"""

from collections.abc import Iterable, Iterator
from typing import Self

from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

from uvc.layers._surgery import meta_copy, take_over
from uvc.layers.block import InARow, UVCBlock, dropped, gated, scaled
from uvc.layers.children import carry_hooks, drop_hooks
from uvc.layers.compact_block import CompactBlock
from uvc.layers.stages import SEVERAL, entries_of, listed


class Thing(nn.Module):
    """One attention and one MLP of such a block, under the names that the children of other blocks have.

    The block calls their modules itself, and is where they are registered.
    """

    # Its tokens are those of the other things, too.
    slims = False

    def __init__(self, attn: nn.Sequential, ffn: nn.Sequential):
        super().__init__()
        self.see(attn, ffn)

    def see(self, attn: nn.Sequential, ffn: nn.Sequential) -> None:
        """Look at these, whose children may have been replaced."""
        self.holders = (attn, ffn)  # in a tuple, so that they are no children
        self._modules.update(attn=attn.attn, mlp=ffn.mlp)
        for digit, half in (("1", attn), ("2", ffn)):
            self._modules.update(
                (f"{name}{digit}", half._modules[name]) for name in ("norm", "ls", "drop_path")
            )
        self.training = attn.training


class UVCThing(Thing, UVCBlock):
    """The same, of which halves and parts of them can be left out."""


class UVCThingsBlock(InARow, ParallelThingsBlock):
    """timm's ParallelThingsBlock, of which halves and parts of each thing can be left out."""

    @classmethod
    def take_over(cls, block: nn.Module) -> Self:
        """One of these on the children and hooks of `block`, with nothing left out."""
        new = take_over(cls, block)
        pairs = list(zip(block.attns, block.ffns, strict=True))
        # In a tuple, so that they are no children.
        new._things = tuple(UVCThing.take_over(Thing(*pair)) for pair in pairs)
        for thing, (attn, ffn) in zip(new._things, pairs, strict=True):
            attn.attn, ffn.mlp = thing.attn, thing.mlp
        return new

    @property
    def entries(self) -> tuple[UVCThing, ...]:
        """Its things, in order."""
        for thing, attn, ffn in zip(self._things, self.attns, self.ffns, strict=True):
            thing.see(attn, ffn)
        return self._things

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks as in timm."""
        things = self._things
        if all(is_whole(thing) for thing in things):
            return ParallelThingsBlock.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        masked = attn_mask is not None or is_causal

        def attended(attn: nn.Sequential) -> Tensor:
            if not masked:
                return attn(x)
            branch = attn.attn(attn.norm(x), attn_mask=attn_mask, is_causal=is_causal)
            return attn.drop_path(attn.ls(branch))

        halves = zip(things, self.attns, strict=True)
        x = added(
            x, [gated(attended(attn), thing._gates[0]) for thing, attn in halves if not thing.skip_attn]
        )
        halves = zip(things, self.ffns, strict=True)
        return added(x, [gated(ffn(x), thing._gates[1]) for thing, ffn in halves if not thing.skip_mlp])


def is_whole(thing: UVCThing) -> bool:
    """Whether nothing of a thing is left out or gated."""
    return thing.attn.is_dense and thing.mlp.is_dense and not any(thing._skip) and not thing.has_gates


def added(x: Tensor, branches: list[Tensor]) -> Tensor:
    """x and the sum of these branches; x without any."""
    return x + sum(branches[1:], branches[0]) if branches else x


class CompactThing(CompactBlock):
    """The running halves of one thing, on small weights."""

    FULL = UVCThing

    def branch(self, half: str, x: Tensor, **masks) -> Tensor:
        """What half "1" or "2" adds to the tokens x."""
        layer = self.attn if half == "1" else self.mlp
        return dropped(self, half, scaled(self, half, layer(self._modules[f"norm{half}"](x), **masks)))


class CompactThingsBlock(InARow):
    """What is left of such a block: its things, on small weights."""

    # What it is made from.
    FULL = UVCThingsBlock

    def __init__(self, block: nn.Module, things: Iterable[CompactThing]):
        """block: timm's, converted, or one of these, whose place it takes."""
        super().__init__()
        self.entries = nn.ModuleList(things)
        compact = isinstance(block, CompactThingsBlock)
        # In a tuple, so that it is no child.
        self._origin = (block.origin if compact else UVCThingsBlock.take_over(meta_copy(block)),)
        drop_hooks(self.origin.modules())
        self.train(block.training)
        carry_hooks(block, self)

    @property
    def origin(self) -> UVCThingsBlock:
        """The dense block on the meta device."""
        return self._origin[0]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks as in timm."""
        masks = {"attn_mask": attn_mask, "is_causal": is_causal}
        x = added(x, [thing.branch("1", x, **masks) for thing in self.entries if thing.record.attn])
        return added(x, [thing.branch("2", x) for thing in self.entries if thing.record.mlp])


def _things(block: nn.Module) -> list[nn.Module]:
    if isinstance(block, UVCThingsBlock | CompactThingsBlock):
        return list(block.entries)
    return [Thing(*pair) for pair in zip(block.attns, block.ffns, strict=True)]


SEVERAL.update({ParallelThingsBlock: _things, CompactThingsBlock: _things})


def joined(model: nn.Module, small: Iterable[CompactBlock]) -> Iterator[nn.Module]:
    """Compact blocks as they take the places of a model's blocks: things go together into one."""
    rest = iter(small)
    for block in listed(model).values():
        mine = [next(rest) for _ in entries_of(block)]
        yield CompactThingsBlock(block, mine) if isinstance(block, tuple(SEVERAL)) else mine[0]

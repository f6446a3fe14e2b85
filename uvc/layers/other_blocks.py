"""Blocks whose layers lie elsewhere than in timm's usual ones, as those of transformers and torchvision do.

What is dense runs as theirs, and their state_dict keys stay.

B batch, N tokens, D width.
"""

import copy
from functools import cache
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from uvc_kernels.warn_once import warn_once

from uvc.layers._surgery import take_over
from uvc.layers.block import UVCBlock, gated
from uvc.layers.children import HOOKS
from uvc.layers.compact_block import CompactBlock
from uvc.layers.other_layers import SeenAttention, SeenGatedMlp, SeenMlp, SeenMultihead, SeenRotaryAttention
from uvc.layers.prunable import Prunable
from uvc.layers.small_weights import passes_on, through_part


class Layout(NamedTuple):
    """Names in a block: its norms, its attention, and what follows attention and MLP inside their branches.

    prefix: tokens before the patches in a model of such blocks, registers aside. mlp: where the MLP is.
    block, small: what takes the place of such a block, on the fly and compact, where it is laid out in a way
    of its own. feed: what takes the place of its MLP, if not one of those that transformers has.
    """

    norms: tuple[str, str]
    attn: str
    after: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    prefix: int = 1
    kind: type[Prunable] = SeenAttention
    mlp: str = "mlp"
    block: "type[OtherBlock] | None" = None
    small: "type[CompactOtherBlock] | None" = None
    feed: type[Prunable] | None = None


_SCALED = Layout(
    ("norm1", "norm2"), "attention", (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
)
_NAMED = Layout(("layernorm_before", "layernorm_after"), "attention", (("dropout",), ("dropout",)))
_CLIP = Layout(("layer_norm1", "layer_norm2"), "self_attn")
# By package and class.
LAYOUTS = {
    ("transformers", "ViTLayer"): _NAMED,
    ("transformers", "DeiTLayer"): _NAMED._replace(prefix=2),
    ("transformers", "Dinov2Layer"): _SCALED,
    ("transformers", "Dinov2WithRegistersLayer"): _SCALED,
    ("transformers", "DINOv3ViTLayer"): _SCALED._replace(kind=SeenRotaryAttention),
    ("transformers", "CLIPEncoderLayer"): _CLIP,
    ("transformers", "SiglipEncoderLayer"): _CLIP._replace(prefix=0),
    ("torchvision", "EncoderBlock"): Layout(
        ("ln_1", "ln_2"), "self_attention", (("dropout",), ()), kind=SeenMultihead
    ),
}


def layout_of(block: nn.Module) -> Layout | None:
    """How one of these blocks, dense or converted, is laid out; None for any other."""
    if isinstance(block, OtherBlock):
        return block.layout
    kind = type(block)
    layout = LAYOUTS.get((kind.__module__.partition(".")[0], kind.__name__))
    return layout if layout is not None and layout.attn in block._modules else None


class Called(nn.Module):
    """How blocks of transformers and torchvision, on the fly and compact, are called."""

    def read(
        self, attention_mask: Tensor | None = None, position_embeddings: Any = None, **_
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask, and the positions, in what a block is called with."""
        known = position_embeddings is not None
        return attention_mask, {"position_embeddings": position_embeddings} if known else {}


class OtherBlock(Called, UVCBlock):
    """One of these blocks, with halves and groups that can be left out.

    The class that is made of it for each of theirs is one of theirs, too.
    """

    layout: Layout

    @classmethod
    def take_over(cls, block: nn.Module) -> Self:
        """One of these on the parameters, children and hooks of `block`, with nothing left out."""
        kind = kind_of(block)
        new = take_over(kind, block)
        attention, mlp = (new._modules[name] for name in (kind.layout.attn, "mlp"))
        seen_mlp = kind.layout.feed or (SeenGatedMlp if "gate_proj" in mlp._modules else SeenMlp)
        new._layers = (kind.layout.kind(attention), seen_mlp(mlp))  # in a tuple, so that they are no children
        new.norm_last = False
        new._skip, new._gates, new._slimming = (False, False), (None, None), None
        return new

    @property
    def attn(self) -> Prunable:
        """The attention, as a layer that can leave parts out."""
        self._layers[0].see(self._modules[self.layout.attn])
        return self._layers[0]

    @property
    def mlp(self) -> Prunable:
        """The MLP, the same; dense, it calls theirs."""
        self._layers[1].see(self._modules["mlp"])
        return self._layers[1]

    def half(self, which: int) -> list[nn.Module]:
        """The norm of a half, and what follows its layer."""
        return [self._modules[name] for name in (self.layout.norms[which], *self.layout.after[which])]

    def around(self) -> tuple[int, int]:
        """Parameters of both halves outside their layers."""
        first, second = (sum(p.numel() for part in self.half(i) for p in part.parameters()) for i in (0, 1))
        return first, second

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks and positions go to the attention."""
        attn, mlp = self.attn, self.mlp
        if attn.is_dense and mlp.is_dense and not any(self._skip) and self._gates == (None, None):
            return super(UVCBlock, self).forward(x, *args, **kwargs)
        mask, positions = self.read(*args, **kwargs)
        if not self._skip[0]:
            say_not_run(attn)
            norm, *after = self.half(0)
            x = x + gated(through(after, attn(norm(x), attn_mask=mask, **positions)), self._gates[0])
        if not self._skip[1]:
            say_not_run(mlp)
            norm, *after = self.half(1)
            x = x + gated(through(after, mlp(norm(x))), self._gates[1])
        return x


def say_not_run(layer: Prunable) -> None:
    """Say, once, that hooks on the module behind a pruned layer are not run: its children alone are."""
    module = layer.seen
    if not layer.is_dense and any(getattr(module, kind) for kind in HOOKS):
        warn_once(
            f"{type(module).__name__}: it has hooks, which are not run while parts of it are pruned; "
            "set them on the block"
        )


def seen(block: nn.Module) -> nn.Module:
    """A block whose attention and MLP can be asked for as `attn` and `mlp`; for timm's, the block itself."""
    return kind_of(block).take_over(block) if needs_names(block) else block


def needs_names(block: nn.Module) -> bool:
    """Whether a block is one of these as its package made it."""
    return not isinstance(block, OtherBlock) and layout_of(block) is not None


def kind_of(block: nn.Module) -> type[OtherBlock]:
    """The class that takes the place of one of these blocks; its own if it did."""
    return type(block) if isinstance(block, OtherBlock) else _kind(type(block), layout_of(block))


@cache
def _kind(theirs: type[nn.Module], layout: Layout) -> type[OtherBlock]:
    return type(f"UVC{theirs.__name__}", (layout.block or OtherBlock, theirs), {"layout": layout})


class CompactOtherBlock(Called, CompactBlock):
    """The running halves of one of these blocks, on small weights; no layer of theirs is left."""

    FULL = OtherBlock

    def __init__(self, dense: nn.Module, record, slimming=None, form: str = "grouped"):
        super().__init__(seen(dense), record, slimming, form)

    def _keep_half(self, dense: OtherBlock, digit: str, name: str, small: nn.Module) -> None:
        norm, *after = dense.half(int(digit) - 1)
        self.add_module(f"norm{digit}", copy.deepcopy(norm))
        self.add_module(name, small)
        after = [part for part in after if not passes_on(part)]
        if after:
            self.add_module(f"after{digit}", nn.Sequential(*map(copy.deepcopy, after)))

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks and positions go to the attention."""
        mask, positions = self.read(*args, **kwargs)
        if self.record.attn:
            branch = self.attn(self.norm1(x), attn_mask=mask, **positions)
            x = x + through_part(self, "after1", branch)
        if self.record.mlp:
            x = x + through_part(self, "after2", self.mlp(self.norm2(x)))
        return x


def through(modules: list[nn.Module], x: Tensor) -> Tensor:
    """x through one module after the other."""
    for module in modules:
        x = module(x)
    return x

"""Attention and MLPs of transformers and torchvision under timm's names; the modules stay where they are.

B batch, N tokens, D width, H heads, K head dim, A = H*K.
"""

import functools
from collections.abc import Callable, Sequence

import timm.layers
import torch
import torch.nn.functional as F
import uvc_kernels
from torch import Tensor, nn

from uvc.layers.compact_mlp import CompactSwiGLU
from uvc.layers.heads import Heads, Source
from uvc.layers.mlp import Neurons, UVCSwiGLU
from uvc.layers.rotary import CompactRotary, RotaryHeads

# Activations of transformers that are one of torch's or timm's under another name.
_ACTIVATIONS = {
    "QuickGELUActivation": timm.layers.activations.QuickGELU,
    "SiLUActivation": nn.SiLU,
}


def activation_of(act: nn.Module) -> nn.Module:
    """An activation, as torch or timm has it, if they have the same."""
    function = getattr(act, "act", None)
    if function is F.gelu:
        return nn.GELU()
    if isinstance(function, functools.partial) and function.func is F.gelu:
        return nn.GELU(**function.keywords)
    return _ACTIVATIONS.get(type(act).__name__, lambda: act)()


class _Seen:
    """A layer whose children are those of another module, in no list of modules itself.

    They are looked up whenever the layer is asked for, so that what took their place is seen, too.
    """

    def see(self, module: nn.Module) -> None:
        """Look at this module, whose kind is the one that the layer was made for."""
        self._seen = (module,)  # in a tuple, so that it is no child
        self._modules.update(self._named(module))
        self.training = module.training
        for drop in self._drops:
            self._modules[drop].training = module.training

    @property
    def seen(self) -> nn.Module:
        """That module."""
        return self._seen[0]

    def _add_drops(self, **rates: float) -> None:
        """Dropouts that the module has no module of its own for."""
        self._drops = tuple(rates)
        for name, rate in rates.items():
            self.add_module(name, nn.Dropout(rate))


class SeenHeads(_Seen):
    """Heads of an attention that says its number of heads in one of two ways."""

    def __init__(self, module: nn.Module):
        super().__init__()
        named = vars(module)
        heads = named.get("num_heads", named.get("num_attention_heads"))
        self.num_heads, self.head_dim = heads, module.head_dim
        self.scale = named.get("scaling", named.get("scale", module.head_dim**-0.5))
        self.fused_attn = True
        rate = named.get("attention_dropout", named.get("dropout", 0.0))
        self._add_drops(attn_drop=rate, proj_drop=0.0)
        for name in ("q_norm", "k_norm"):
            self.add_module(name, nn.Identity())
        self.see(module)

    def _dense(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        return self._seen[0](x, attention_mask=attn_mask, **positions)[0]

    def placed(self, x: Tensor, heads: list[int], **positions) -> uvc_kernels.Positions | None:
        """There are no positions."""
        return uvc_kernels.Positions()


class SeenAttention(SeenHeads, Heads):
    """The attention of transformers: q, k and v of a linear layer each."""

    LINEARS = ("q_proj", "k_proj", "v_proj", "proj")
    OUTSIDE = "attention of separate q, k and v"

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        children = module._modules
        found = {name: children[name] for name in ("q_proj", "k_proj", "v_proj")}
        return found | {"proj": children["o_proj"] if "o_proj" in children else children["out_proj"]}

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from."""
        return tuple(Source(p.weight, 0, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def rope_of(position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Sine and cosine [N, 2K], as timm has them, of cosine and sine [N, K]."""
    return None if position_embeddings is None else torch.cat(position_embeddings[::-1], dim=-1)


class _Turned(nn.Module):
    """Rotary positions as transformers gives them: cosine and sine [N, K] of the patches, which come last."""

    def positioned(
        self,
        q: Tensor,
        k: Tensor,
        heads: Sequence[int],
        dims: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, E], turned."""
        return super().positioned(q, k, heads, dims, rope=rope_of(position_embeddings))

    def _patches(self, x: Tensor, turn: Callable[..., Tensor], *positions) -> Tensor:
        """x with its patch tokens turned."""
        first = x.shape[2] - positions[0].shape[-2]
        return torch.cat([x[:, :, :first], turn(x[:, :, first:], *positions)], dim=2)


class CompactTurned(_Turned, CompactRotary):
    """The kept heads of an attention with such positions."""


class SeenRotaryAttention(_Turned, SeenAttention, RotaryHeads):
    """The attention of transformers' DINOv3."""

    SMALL = CompactTurned
    OUTSIDE = "attention with rotary positions"
    num_prefix_tokens, rotate_half = 0, True
    slims = False

    def placed(
        self, x: Tensor, heads: list[int], position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> uvc_kernels.Positions | None:
        """What the positions turn."""
        return RotaryHeads.placed(self, x, heads, rope_of(position_embeddings))


class SeenMultihead(SeenHeads, Heads):
    """torch's nn.MultiheadAttention, as torchvision calls it."""

    LINEARS = ("proj",)
    OUTSIDE = "nn.MultiheadAttention"

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        self._parameters.update(module._parameters)
        return {"proj": module._modules["out_proj"]}

    @property
    def _weight_bias(self) -> tuple[Tensor, Tensor | None]:
        return self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from."""
        weight, bias = self._weight_bias
        return tuple(Source(weight, i * self.dims, bias, i * self.dims) for i in range(3))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A]."""
        return F.linear(x, *self._weight_bias).chunk(3, dim=-1)

    def _dense(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        return self._seen[0](x, x, x, need_weights=False)[0]


class SeenNeurons(_Seen):
    """Neurons of another module, without a norm over them."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._add_drops(drop1=0.0, drop2=0.0)
        self.add_module("norm", nn.Identity())
        self.see(module)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return self._seen[0](x) if self.is_dense else super().forward(x)


class SeenMlp(SeenNeurons, Neurons):
    """Two linear layers."""

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        children = module._modules
        if "fc1" in children:
            names = {"fc1": "fc1", "act": "activation_fn", "fc2": "fc2"}
        elif "up_proj" in children:
            names = {"fc1": "up_proj", "act": "act_fn", "fc2": "down_proj"}
        else:  # torchvision's list, with its own dropouts
            names = {"fc1": "0", "act": "1", "drop1": "2", "fc2": "3", "drop2": "4"}
            self._drops = ()
        found = {name: children[own] for name, own in names.items()}
        return found | {"act": activation_of(found["act"])}


class SeenGatedMlp(SeenNeurons, Neurons):
    """A gated MLP of two first layers."""

    LINEARS = UVCSwiGLU.LINEARS
    SMALL = CompactSwiGLU
    _rows, _hidden, _first_layer = UVCSwiGLU._rows, UVCSwiGLU._hidden, UVCSwiGLU._first_layer

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        names = {"fc1_g": "gate_proj", "act": "act_fn", "fc1_x": "up_proj", "fc2": "down_proj"}
        found = {name: module._modules[own] for name, own in names.items()}
        return found | {"act": activation_of(found["act"])}

"""Blocks of Gemma 4's vision encoder: norms around both halves, and of q, k and v; linear layers that clip.

B batch, N tokens, D width, H heads, K head dim; h kept heads.
"""

import copy
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.layers.compact_attention import CompactAttention, heads_of_mask
from uvc.layers.compact_mlp import CompactSwiGLU
from uvc.layers.other_blocks import LAYOUTS, CompactOtherBlock, Layout, OtherBlock
from uvc.layers.other_layers import SeenAttention, SeenGatedMlp
from uvc.layers.small_weights import through_part

# What timm calls the layers that clip.
OWN = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}
FEED = {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}
Rope = tuple[Tensor, Tensor]  # cosine and sine [B, N, K]


def clipped(bounds: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] times a weight, clipped before and after where timm's layer does so."""
    if not bounds.use_clipped:
        return F.linear(x, weight)
    y = F.linear(x.clamp(bounds.input_min, bounds.input_max), weight)
    return y.clamp(bounds.output_min, bounds.output_max)


class ClippedLinear(nn.Module):
    """A linear layer of kept rows or columns, with the bounds of timm's."""

    is_compact = True

    def __init__(self, theirs: nn.Module, linear: nn.Linear):
        super().__init__()
        self.linear, self.use_clipped = linear, theirs.use_clipped
        for name, bound in theirs._buffers.items():
            self.register_buffer(name, bound.detach().clone())

    @property
    def in_features(self) -> int:
        """What it reads of a token."""
        return self.linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D']."""
        return clipped(self, x, self.linear.weight)


class _Gemma(nn.Module):
    """What a dense and a compact layer do with q and k."""

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: None, position_embeddings: Rope
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, K], normalised, and turned across and down."""
        turn = import_module("timm.models.gemma4_vit").apply_multidimensional_rope
        parts = (through_part(self, "q_norm", q), through_part(self, "k_norm", k))
        return tuple(turn(part, *position_embeddings, ndim=2, unsqueeze_dim=1) for part in parts)


class CompactGemmaAttention(_Gemma, CompactAttention):
    """The kept heads, all their dims."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.v_norm = copy.deepcopy(dense.seen.v_norm)
        for name, theirs in OWN.items():
            self.add_module(name, ClippedLinear(getattr(dense.seen, theirs), self._modules[name]))

    def _heads(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        return [(q, k, self.v_norm(v)) for q, k, v in super()._heads(x)]


class SeenGemmaAttention(_Gemma, SeenAttention):
    """timm's Gemma4Attention, of which heads can be left out."""

    SMALL = CompactGemmaAttention
    OUTSIDE = "a norm of q, k and v"
    slims = False
    free_bases = ()

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.scale = 1.0

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        self._drops = ()
        linears = {f"{n}_proj": getattr(module, f"{n}_proj").linear for n in "qkv"}
        others = {n: module._modules[n] for n in ("q_norm", "k_norm", "attn_drop", "proj_drop")}
        return {**linears, "proj": module.o_proj.linear, **others}

    @classmethod
    def fault(cls, attn: nn.Module) -> str | None:
        """Beside other children: heads that share keys and values."""
        if attn.seen.num_kv_groups > 1:
            return "k_proj gives keys that several heads share; neurons could go"
        return super().fault(attn)

    def ties(self) -> dict[str, str]:
        """Norms tie all dims of a head."""
        return super().ties() | {"v": "v_norm is an RmsNorm, whose statistics are over those of a head"}

    def placed(self, x: Tensor, heads: list[int], **positions) -> None:
        """Norms are outside the op."""
        return None

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from their layers."""
        return tuple(getattr(self.seen, f"{name}_proj")(x) for name in "qkv")

    def forward(
        self, x: Tensor, *rope: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; a dense one is called as timm's by timm's block."""
        return super().forward(
            x, attn_mask, is_causal, **({"position_embeddings": rope} if rope else positions)
        )

    def _dense(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, position_embeddings: Rope
    ) -> Tensor:
        return self.seen(x, *position_embeddings, attn_mask=attn_mask)

    def _called(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        q, k, v = self._heads(x, **positions)
        out = self.attended_by_children(q, k, self.seen.v_norm(v), attn_mask, is_causal)
        removed = self.kept(x.device).whole_columns.flatten() < 0
        return self.proj_drop(self.seen.o_proj(out.transpose(1, 2).flatten(2).masked_fill(removed, 0.0)))

    def _gathered(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        heads = self._masks[1].any(1).nonzero().flatten().tolist()
        rows = torch.tensor(heads, dtype=torch.int64, device=x.device)[:, None] * self.head_dim
        rows = (rows + torch.arange(self.head_dim, device=x.device)).flatten()
        theirs, out = self.seen, x.new_zeros(*x.shape[:2], 0)
        if heads:
            parts = (
                clipped(bounds, x, bounds.linear.weight[rows]).unflatten(-1, (len(heads), -1)).transpose(1, 2)
                for bounds in (theirs.q_proj, theirs.k_proj, theirs.v_proj)
            )
            q, k, v = parts
            q, k = self.positioned(q, k, heads, None, **positions)
            mask = heads_of_mask(attn_mask, heads, self.num_heads)
            out = self.attended(q, k, theirs.v_norm(v), mask, is_causal).transpose(1, 2).flatten(2)
        return self.proj_drop(clipped(theirs.o_proj, out, self.proj.weight[:, rows]))


class CompactGemmaMlp(CompactSwiGLU):
    """The kept neurons."""

    def __init__(self, dense: nn.Module, neurons: tuple[int, ...], form: str = "grouped"):
        super().__init__(dense, neurons, form)
        for name, theirs in FEED.items():
            self.add_module(name, ClippedLinear(dense.seen._modules[theirs], self._modules[name]))


class SeenGemmaMlp(SeenGatedMlp):
    """timm's Gemma4GatedMlp, of which neurons can be left out."""

    SMALL = CompactGemmaMlp

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        self._drops = ("drop1",)
        linears = {name: module._modules[theirs].linear for name, theirs in FEED.items()}
        return {**linears, "act": module.act, "drop2": module.drop}

    def _hidden(self, x: Tensor) -> Tensor:
        return self.act(self.seen.gate_proj(x)) * self.seen.up_proj(x)

    def _called(self, x: Tensor) -> Tensor:
        removed = self.kept(x.device).whole < 0
        return self.drop2(self.seen.down_proj(self._hidden(x).masked_fill(removed, 0.0)))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        gate, up, down = (self.seen._modules[theirs] for theirs in FEED.values())
        if self.is_dense or x.is_meta or not gate.use_clipped or not self.reads_weights:
            return super().forward(x)
        neurons = self.kept(x.device).neurons
        hidden = self.act(clipped(gate, x, gate.linear.weight[neurons]))
        hidden = hidden * clipped(up, x, up.linear.weight[neurons])
        return self.drop2(clipped(down, hidden, down.linear.weight[:, neurons]))


class _Named(nn.Module):
    """How such a block is called."""

    def read(
        self, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Rope]]:
        """The mask, and the positions, in what a block is called with."""
        return attn_mask, {"position_embeddings": (rope_cos, rope_sin)}


class UVCGemmaBlock(_Named, OtherBlock):
    """timm's Gemma4Block, of which halves, heads and neurons can be left out."""


class CompactGemmaBlock(_Named, CompactOtherBlock):
    """The running halves of such a block, on small weights."""


LAYOUTS["timm", "Gemma4Block"] = Layout(
    ("norm1", "norm3"),
    "attn",
    (("norm2", "drop_path"), ("norm4", "drop_path")),
    prefix=0,
    kind=SeenGemmaAttention,
    feed=SeenGemmaMlp,
    block=UVCGemmaBlock,
    small=CompactGemmaBlock,
)

"""Attention with rotary positions (EVA-02, DINOv3, Perception Encoder, ...), which turn q/k dims in pairs.

B batch, N tokens, H heads, K head dim; h kept heads.
"""

from collections.abc import Sequence

import torch
import uvc_kernels
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from uvc.layers.compact_attention import CompactAttention, heads_of_mask
from uvc.layers.heads import Heads, Source, with_biases
from uvc.layers.small_weights import through_part


class _Rotary(nn.Module):
    """What turns q and k, in a dense and in a compact layer."""

    def positioned(
        self,
        q: Tensor,
        k: Tensor,
        heads: Sequence[int],
        dims: Tensor | None,
        rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, E], turned by `rope`, sine and cosine [(H,) N, 2K] of the patches.

        dims [h, E]: which of the K dims, those of a pair side by side; None: all, as they come.
        """
        q, k = through_part(self, "q_norm", q), through_part(self, "k_norm", k)
        if rope is None or q.shape[-1] == 0:
            return q, k
        rope = heads_of_mask(rope, list(heads), self.num_heads)
        if dims is None:
            half = getattr(self, "rotate_half", False)
            return tuple(self._patches(x, apply_rot_embed_cat, rope, half) for x in (q, k))
        # [(B,) h or 1, N, K], of which each head takes its own dims.
        tables = (rope if rope.dim() > 2 else rope[None]).chunk(2, dim=-1)
        dims = dims[:, None, :] if rope.dim() < 4 else dims[None, :, None, :]
        sine, cosine = (torch.take_along_dim(table, dims, dim=-1) for table in tables)
        return tuple(self._patches(x, turned, sine, cosine) for x in (q, k))

    def _patches(self, x: Tensor, turn, *positions) -> Tensor:
        """x with its patch tokens turned."""
        first = self.num_prefix_tokens
        return torch.cat([x[:, :, :first], turn(x[:, :, first:], *positions)], dim=2).type_as(x)


def turned(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """x [..., E] turned, the dims of a pair side by side: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack([-b, a], dim=-1).flatten(-2) * sine


class CompactRotary(_Rotary, CompactAttention):
    """The kept heads of attention with rotary positions."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.num_prefix_tokens = dense.num_prefix_tokens
        self.rotate_half = getattr(dense, "rotate_half", False)


class RotaryHeads(_Rotary, Heads):
    """Heads whose q, k and v come from one linear layer or from three."""

    SMALL = CompactRotary
    OUTSIDE = "attention with rotary positions"
    slims = False

    def pairs(self) -> Tensor | None:
        """The q/k dims of a head that are turned together [K / 2, 2]; None where a norm ties them all, whose
        weights are in the order of the dims.
        """
        if "qk" in self.ties():
            return None
        dims = torch.arange(self.head_dim, device="cpu")
        return dims.view(2, -1).T if getattr(self, "rotate_half", False) else dims.view(-1, 2)

    @property
    def free_bases(self) -> tuple[str, ...]:
        """Only v dims can be mixed."""
        return tuple(family for family in super().free_bases if family != "qk")

    def placed(self, x: Tensor, heads: list[int], rope: Tensor | None = None) -> uvc_kernels.Positions | None:
        """What `rope` turns; positions that are trained are outside the op."""
        if rope is None:
            return uvc_kernels.Positions()
        if rope.requires_grad:
            return None
        partner = self.partner(x.device)
        sine, cosine = rope.chunk(2, dim=-1)
        return uvc_kernels.Positions(
            uvc_kernels.turn_of(sine, cosine, partner, x.shape[1] - rope.shape[-2]), partner
        )

    def partner(self, device: torch.device) -> Tensor:
        """The dim that each q/k dim of a head is turned with [K]."""
        pairs = self.pairs()
        other = torch.empty(self.head_dim, dtype=torch.int64, device="cpu")
        other[pairs] = pairs.flip(1)
        return other.to(device)

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from."""
        if self.qkv is not None:
            return super().sources()
        return tuple(Source(p.weight, 0, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        if self.qkv is not None:
            return super().projected(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class UVCAttentionRope(RotaryHeads, AttentionRope):
    """timm's AttentionRope, of which heads, pairs of q/k dims and v dims can be left out."""


class UVCEvaAttention(RotaryHeads, EvaAttention):
    """timm's EvaAttention, the same; its fused q, k and v have no bias of k."""

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from; biases of q and v are parameters of the layer."""
        q, k, v = super().sources()
        if self.q_bias is None:
            return q, k, v
        return q._replace(bias=self.q_bias, bias_row=0), k, v._replace(bias=self.v_bias, bias_row=0)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        return super().projected(x) if self.q_bias is None else with_biases(self, x)

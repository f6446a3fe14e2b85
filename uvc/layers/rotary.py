"""Attention with rotary positions (EVA-02, DINOv3, Perception Encoder, ...), which turn q/k dims in pairs.

B batch, N tokens, H heads, K head dim; h kept heads.
"""

from collections.abc import Sequence

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from uvc.layers.compact_layers import CompactAttention, heads_of_mask
from uvc.layers.heads import Heads, Source, with_biases


class _Rotary(nn.Module):
    """What turns q and k, in a dense and in a compact layer."""

    def positioned(
        self, q: Tensor, k: Tensor, heads: Sequence[int], rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, K], turned by `rope`, sine and cosine [(H,) N, 2K] of patches."""
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is None:
            return q, k
        rope = heads_of_mask(rope, list(heads), self.num_heads)
        return self._turned(q, rope), self._turned(k, rope)

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        first, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        patches = apply_rot_embed_cat(x[:, :, first:], rope, half=half)
        return torch.cat([x[:, :, :first], patches], dim=2).type_as(x)


class CompactRotary(_Rotary, CompactAttention):
    """The kept heads of attention with rotary positions."""

    def __init__(self, dense: nn.Module, record):
        super().__init__(dense, record)
        self.num_prefix_tokens = dense.num_prefix_tokens
        self.rotate_half = getattr(dense, "rotate_half", False)


class RotaryHeads(_Rotary, Heads):
    """Heads whose q, k and v come from one linear layer or from three."""

    SMALL = CompactRotary
    OUTSIDE = "attention with rotary positions"
    slims = False

    def ties(self) -> dict[str, str]:
        """The positions tie the q/k dims of a head, too."""
        return {"qk": "rotary positions turn them in pairs"} | super().ties()

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
    """timm's AttentionRope, of which heads and v dims can be left out."""

    @classmethod
    def fault(cls, attn: nn.Module) -> str | None:
        """Beside other children: heads that share keys and values."""
        if getattr(attn, "num_kv_groups", 1) > 1:
            return "k_proj gives keys that several heads share (grouped queries)"
        return super().fault(attn)


class UVCEvaAttention(RotaryHeads, EvaAttention):
    """timm's EvaAttention, of which heads and v dims can be left out; its fused q, k, v have no bias of k."""

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from; biases of q and v are parameters of the layer."""
        q, k, v = super().sources()
        if self.q_bias is None:
            return q, k, v
        return q._replace(bias=self.q_bias, bias_row=0), k, v._replace(bias=self.v_bias, bias_row=0)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        return super().projected(x) if self.q_bias is None else with_biases(self, x)

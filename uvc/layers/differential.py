"""Differential attention: each head subtracts a share of a second map of weights from a first one.

B batch, N tokens, H heads, K head dim; h kept heads. The first K / 2 q/k dims of a head make its first map,
the others its second; both weigh the same K v dims, over which there is a norm.
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers import DiffAttention
from torch import Tensor, nn

from uvc.layers.children import drop_rate
from uvc.layers.compact_attention import CompactAttention, heads_in_groups, heads_of_mask, masked
from uvc.layers.heads import Heads, gathered_rows, padded_rows
from uvc.layers.small_weights import through_part, without_inputs

LAMBDAS = ("lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class _Maps(nn.Module):
    """What a dense and a compact layer do with both maps."""

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """One map [B, h, N, N] of its q/k dims [B, h, N, E]."""
        q, k = through_part(self, "q_norm", q), through_part(self, "k_norm", k)
        scores = (
            self.scale * q @ k.transpose(-2, -1) if q.shape[-1] else q.new_zeros(*q.shape[:3], q.shape[2])
        )
        return through_part(self, "attn_drop", masked(scores, mask, is_causal).softmax(dim=-1))

    def subtracted(self, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
        """What both maps make of v [B, h, N, K], normalised, as [B, N, h * K]."""
        share = DiffAttention._compute_lambda(self).type_as(v)
        return self.normalised((first - share * second) @ v)

    def normalised(self, out: Tensor) -> Tensor:
        """out [B, h, N, K] -> [B, N, h * K]."""
        return (self.sub_norm(out) * (1 - self.lambda_init)).transpose(1, 2).flatten(2)


class CompactDiffAttention(_Maps, CompactAttention):
    """The kept heads, each by itself, as each has its own q/k dims in either map."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        half, groups = dense.head_dim // 2, heads_in_groups(record, form, dense.head_dim)
        # How many dims of each head are of the first map; padding is behind those of the second.
        self._first = [[sum(d < half for d in qk) for _, qk, _ in members] for _, members in groups]
        self.sub_norm, self.lambda_init = copy.deepcopy(dense.sub_norm), dense.lambda_init
        for name in LAMBDAS:
            self.register_parameter(name, copy.deepcopy(getattr(dense, name)))

    def scored(
        self, x: Tensor, slimming: None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, None]:
        """As `forward`; no tokens are ranked."""
        if not self.groups:
            return through_part(self, "proj_drop", without_inputs(self.proj, x)), None
        outputs = []
        for group, counts, parts in zip(self.groups, self._first, self._heads(x), strict=True):
            for i, (head, n) in enumerate(zip(group.heads, counts, strict=True)):
                q, k, v = (part[:, i : i + 1] for part in parts)
                mask = heads_of_mask(attn_mask, [head], self.num_heads)
                first = self.weights(q[..., :n], k[..., :n], mask, is_causal)
                outputs.append(
                    self.subtracted(first, self.weights(q[..., n:], k[..., n:], mask, is_causal), v)
                )
        out = torch.cat(outputs, dim=-1)
        out = through_part(self, "norm", out if self._order is None else out[..., self._order])
        return through_part(self, "proj_drop", self.proj(out)), None


class DiffHeads(_Maps, Heads):
    """What every differential attention shares; heads and q/k dims can be left out."""

    SMALL = CompactDiffAttention
    OUTSIDE = "differential attention"
    slims = False
    free_bases = ()

    def ties(self) -> dict[str, str]:
        """There is a norm over the v dims of a head."""
        return super().ties() | {"v": "sub_norm is an RmsNorm, whose statistics are over those of a head"}

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """There are no positions; norms are of each map."""
        return q, k

    def placed(self, x: Tensor, heads: list[int], **positions) -> None:
        """The op of one map does not serve."""

    def _dense(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        q, k, v = self._heads(x)
        if self.fused_attn:
            share = DiffAttention._compute_lambda(self).type_as(v)
            first, second = (
                F.scaled_dot_product_attention(
                    self.q_norm(q), self.k_norm(k), v, attn_mask, drop_rate(self.attn_drop), is_causal
                )
                for q, k in zip(maps_of(q), maps_of(k), strict=True)
            )
            out = self.normalised(first - share * second)
        else:
            out = self.attended_by_children(q, k, v, attn_mask, is_causal)
            out = out.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(out)))

    def attended_by_children(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """What the maps of all heads make of v, [B, H, N, K]."""
        maps = (self.weights(a, b, mask, is_causal) for a, b in zip(maps_of(q), maps_of(k), strict=True))
        return self.subtracted(*maps, v).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _gathered(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        B, N, _ = x.shape
        qk_mask, v_mask = self._masks
        heads = v_mask.any(1).nonzero().flatten()
        if len(heads) == 0:
            return super()._gathered(x, attn_mask, is_causal)
        device = self.proj.weight.device
        halves = torch.arange(self.head_dim, device="cpu").view(2, -1, 1)
        kept = [padded_rows(heads, qk_mask, half) for half in halves]
        kept = [[t.to(device) for t in part] for part in (*kept, *kept, padded_rows(heads, v_mask))]
        q, k, v = self.sources()
        parts = gathered_rows(x, (q, q, k, k, v), kept)
        parts = (part.reshape(B, N, len(heads), -1).transpose(1, 2) for part in parts)
        q_first, q_second, k_first, k_second, values = parts
        mask = heads_of_mask(attn_mask, heads.tolist(), self.num_heads)
        first = self.weights(q_first, k_first, mask, is_causal)
        out = self.norm(self.subtracted(first, self.weights(q_second, k_second, mask, is_causal), values))
        return self.proj_drop(F.linear(out, self.proj.weight[:, kept[-1][0]], self.proj.bias))


class UVCDiffAttention(DiffHeads, DiffAttention):
    """timm's DiffAttention, of which heads and q/k dims can be left out."""

    @property
    def head_dim(self) -> int:
        """K; timm calls half of it so."""
        return self.proj.in_features // self.num_heads


def maps_of(part: Tensor) -> tuple[Tensor, Tensor]:
    """The q or k of each map, of those of heads [..., K]."""
    return part.unflatten(-1, (2, -1)).unbind(-2)

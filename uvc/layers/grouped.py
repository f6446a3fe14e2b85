"""Grouped queries: attention with rotary positions in which several heads share keys and values (Sapiens 2).

B batch, N tokens, H heads, K head dim. A q/k dim is a row of q, a v dim a column of the output; the rows of k
and v stay while the half runs, as other heads may read them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.layers.children import product
from uvc.layers.prunable import Part, rows
from uvc.layers.rotary import CompactRotary, UVCAttentionRope
from uvc.layers.small_weights import PADDING, linear_of, select


class CompactGrouped(CompactRotary):
    """The kept heads, with the keys and values of all."""

    def _keep_sources(self, dense: nn.Module, kept: list[tuple[list[int], ...]]) -> None:
        self.k, self.v = copy.deepcopy(dense.k_proj), copy.deepcopy(dense.v_proj)
        q = dense.q_proj
        index = [row for part, _, _ in kept for row in part]
        self.q = linear_of(select(q.weight, 0, index), None if q.bias is None else select(q.bias, 0, index))
        # What each group of heads takes of keys and values; padding is behind them.
        self._taken = [[[dense.shared(row) for row in part] for part in parts] for _, *parts in kept]

    def _projected(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        q = product(self.q, x).split([len(group.heads) * group.dq for group in self.groups], -1)
        k, v = (F.pad(product(part, x), (0, 1)) for part in (self.k, self.v))
        taken = [
            [torch.tensor(index, dtype=torch.int64, device=x.device) for index in group]
            for group in self._taken
        ]
        found = zip(q, taken, strict=True)
        return [(own, k.index_select(-1, of_k), v.index_select(-1, of_v)) for own, (of_k, of_v) in found]

    def scored(self, x: Tensor, *masks, **positions) -> tuple[Tensor, Tensor | None]:
        """As `CompactAttention.scored`."""
        if not self.groups:
            self.k(x), self.v(x)  # what stays whatever is removed is computed, as the cost counts it
        return super().scored(x, *masks, **positions)


class UVCGroupedRope(UVCAttentionRope):
    """timm's AttentionRope of shared keys and values, of which heads, q/k dims and v dims can be left out."""

    SMALL = CompactGrouped
    free_bases = ()

    def shared(self, row: int) -> int:
        """Which row of k or v the dim `row` of all heads reads; what is padding reads zeros behind them."""
        head, dim = divmod(row, self.head_dim)
        return self.kv_dim if row == PADDING else head // self.num_kv_groups * self.head_dim + dim

    def of_heads(self, shared: Tensor, dim: int) -> Tensor:
        """Rows of k or v for every head that reads them."""
        heads = shared.unflatten(dim, (self.num_kv_heads, self.head_dim))
        return heads.repeat_interleave(self.num_kv_groups, dim).flatten(dim, dim + 1)

    def sources(self):
        """Where q, k and v come from: the rows of a head once for each that reads them."""
        q, *both = super().sources()
        expanded = (
            s._replace(
                weight=self.of_heads(s.weight, 0), bias=None if s.bias is None else self.of_heads(s.bias, 0)
            )
            for s in both
        )
        return q, *expanded

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        q, *both = super().projected(x)
        return q, *(self.of_heads(part, 2) for part in both)

    def parts(self) -> list[Part]:
        """A q/k dim is a row of q; a v dim a column of proj, and a row of the gate."""
        A = self.dims
        found = [Part("v", self.proj.weight, 0, A, 1, True), *rows("qk", self.q_proj, 0, A, True)]
        return found if self._gate is None else [*found, *rows("v", self._gate, 0, A)]

    def half_macs(self, tokens: int) -> int:
        """Multiply-accumulates of an image that stay whatever is removed: keys and values."""
        return tokens * (self.k_proj.weight.numel() + self.v_proj.weight.numel())

"""Attention of SAM 2's Hiera, in windows or over all tokens; of several queries it may take the largest.

B images or windows of Y x X tokens, N of them, D width, D' width that leaves; H heads, K head dim; h kept.
"""

import math
from typing import Self

import uvc_kernels
from timm.models.hieradet_sam2 import MultiScaleAttention
from torch import Tensor, nn

from uvc.layers.biased import Unmasked
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.heads import Heads


class _Pooled(nn.Module):
    """The attention, on the fly or compact; `strides`: how many tokens give one query, down and across."""

    strides: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Y, X, D] -> [B, Y', X', D']."""
        size = x.shape[1:3]
        y = super().forward(x.flatten(1, 2), size=size)
        return y.unflatten(1, tuple(n // s for n, s in zip(size, self.strides, strict=True)))

    def answered(self, x: Tensor) -> Tensor:
        """As many tokens of x [B, N, D], a square, as there are queries."""
        return x[:, : math.prod(math.isqrt(x.shape[1]) // s for s in self.strides)]

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The largest q [B, h, N, E] of each rectangle of tokens; what does not fill one is left out."""
        (down, across), (Y, X) = self.strides, size
        if self.strides == (1, 1):
            return q, k
        q = q.unflatten(2, size)[:, :, : Y // down * down, : X // across * across]
        return q.unflatten(3, (-1, across)).unflatten(2, (-1, down)).amax(dim=(3, 5)).flatten(2, 3), k


class CompactPooledAttention(_Pooled, CompactAttention):
    """The kept heads of this attention."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.strides = dense.strides


class UVCPooledAttention(_Pooled, Unmasked, MultiScaleAttention):
    """timm's MultiScaleAttention, of which heads, q/k dims and v dims can be left out."""

    SMALL = CompactPooledAttention
    OUTSIDE = "pooling of queries"

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """One of these on the parameters, children and hooks of `module`, which has no dropout."""
        new = super().take_over(module)
        # `module` stays as it is.
        new._modules = dict(new._modules)
        new.attn_drop, new.proj_drop = nn.Identity(), nn.Identity()
        return new

    @property
    def head_dim(self) -> int:
        """K, the dims of a head."""
        return self.proj.in_features // self.num_heads

    @property
    def strides(self) -> tuple[int, int]:
        """How many tokens give one query, down and across."""
        return (1, 1) if self.q_pool is None else tuple(self.q_pool.stride)

    @property
    def free_bases(self) -> tuple[str, ...]:
        """What is largest of q dims depends on their basis."""
        return tuple(f for f in super().free_bases if f != "qk" or self.q_pool is None)

    def placed(self, x: Tensor, heads: list[int], **positions) -> uvc_kernels.Positions | None:
        """There are no positions; queries that are pooled are outside the op."""
        return uvc_kernels.Positions() if self.q_pool is None else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Y, X, D] -> [B, Y', X', D']."""
        return super(Heads, self).forward(x) if self.is_dense else super().forward(x)

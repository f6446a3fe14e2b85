"""Attention in mask units, or over all tokens, that may take the largest query of several tokens (Hiera).

B images, N tokens, W units of them, D width; s tokens give one query; H heads, h kept heads.
"""

from typing import Self

import uvc_kernels
from timm.models.hiera import MaskUnitAttention
from torch import Tensor, nn

from uvc.layers.biased import Unmasked
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.heads import Heads


class _InUnits(nn.Module):
    """The attention of each unit alone, on the fly or compact."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D], unit by unit within each place of a unit -> [B, N / s, D']."""
        B, N, D = x.shape
        units = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        y = super().forward(x.reshape(B, -1, units, D).transpose(1, 2).reshape(B * units, -1, D))
        return y.reshape(B, units, -1, y.shape[-1]).transpose(1, 2).flatten(1, 2)

    def answered(self, x: Tensor) -> Tensor:
        """As many tokens of a unit as there are queries."""
        return x[:, : x.shape[1] // self.q_stride]

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """q [B, h, N, E] of every s tokens becomes their largest."""
        return q if self.q_stride == 1 else q.unflatten(2, (self.q_stride, -1)).amax(dim=2), k


class CompactMaskUnits(_InUnits, CompactAttention):
    """The kept heads of Hiera's attention."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        for name in ("q_stride", "window_size", "use_mask_unit_attn"):
            setattr(self, name, getattr(dense, name))


class UVCMaskUnitAttention(_InUnits, Unmasked, MaskUnitAttention):
    """timm's MaskUnitAttention, of which heads, q/k dims and v dims can be left out."""

    SMALL = CompactMaskUnits
    OUTSIDE = "attention in mask units"

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """One of these on the parameters, children and hooks of `module`, which has no dropout."""
        new = super().take_over(module)
        # `module` stays as it is.
        new._modules = dict(new._modules)
        new.attn_drop, new.proj_drop = nn.Identity(), nn.Identity()
        return new

    def placed(self, x: Tensor, heads: list[int], **positions) -> uvc_kernels.Positions | None:
        """There are no positions; queries that are pooled are outside the op."""
        return uvc_kernels.Positions() if self.q_stride == 1 else None

    @property
    def num_heads(self) -> int:
        """H."""
        return self.heads

    @property
    def free_bases(self) -> tuple[str, ...]:
        """What is largest of q/k dims depends on their basis."""
        return tuple(family for family in super().free_bases if family != "qk" or self.q_stride == 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N / s, D']."""
        return super(Heads, self).forward(x) if self.is_dense else super().forward(x)

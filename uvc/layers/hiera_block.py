"""Blocks of Hiera: of those that pool or grow, the residual is made anew.

B images, N tokens, D width.
"""

import torch
from timm.models.hiera import HieraBlock
from torch import Tensor, nn

from uvc.layers.block import InARow, Reads, UVCBlock
from uvc.layers.compact_block import CompactBlock


class InUnits(InARow):
    """How the halves of a block read tokens [B, N, D], whose attention may pool them."""

    def stays(self) -> tuple[str, ...]:
        """The residual of a block that grows runs through its norm and its projection."""
        return ("norm1", "proj") if self.do_expand and self.proj is not None else ()

    def pools(self) -> int:
        """How many tokens become one."""
        return self.attn.q_stride

    def residual(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N', D'], grown and pooled where the block does so."""
        if not self.do_expand:
            return x
        grown = x if self.proj is None else self.proj(self.norm1(x))
        grown = grown.unflatten(1, (self.pools(), -1))
        most = grown.amax(dim=1)
        return most if self.proj is not None else torch.cat([most, grown.mean(dim=1)], dim=-1)

    def reads(self, arriving: int, leaving: int) -> Reads:
        """What is read: each unit's queries and keys, over all that are left."""
        attn, queries = self.attn, arriving // self.attn.q_stride
        keys = attn.q_stride * attn.window_size if attn.use_mask_unit_attn else arriving
        return Reads(arriving, queries * keys, queries, queries)

    def attended(self, y: Tensor, **_) -> Tensor:
        """What the attention makes of the input of its half."""
        return self.attn(y)


class UVCHieraBlock(InUnits, UVCBlock, HieraBlock):
    """timm's block of Hiera."""


class CompactHieraBlock(InUnits, CompactBlock):
    """The running halves of a block of Hiera, and its residual."""

    FULL = UVCHieraBlock

    def __init__(self, dense: nn.Module, record, slimming=None, form: str = "grouped"):
        super().__init__(dense, record, slimming, form)
        self.do_expand, self.pooled = dense.do_expand, dense.attn.q_stride
        if "proj" not in self._modules:
            self.proj = None

    def pools(self) -> int:
        """How many tokens become one."""
        return self.pooled

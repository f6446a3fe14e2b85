"""Blocks of SAM 2's Hiera: in windows, of those that pool or grow the residual is made anew.

B images or windows of Y x X tokens, D width, D' width that leaves.
"""

import math

import torch.nn.functional as F
from timm.models.hieradet_sam2 import MultiScaleBlock, window_partition, window_unpartition
from torch import Tensor, nn

from uvc.layers.block import InARow, Reads, UVCBlock
from uvc.layers.compact_block import CompactBlock


def strides_of(block: nn.Module) -> tuple[int, int]:
    """How many tokens become one, down and across, in a block of timm's or what takes its place."""
    return tuple(block.q_stride or (1, 1))


class InPooledWindows(InARow):
    """How the halves of a block read tokens [B, Y, X, D]."""

    def stays(self) -> tuple[str, ...]:
        """The residual of a block that grows runs through its norm and its projection."""
        if self.dim == self.dim_out:
            return ()
        return ("norm1", "proj") if self.pool is None else ("norm1", "proj", "pool")

    def pools(self) -> int:
        """How many tokens become one."""
        return math.prod(strides_of(self))

    def residual(self, x: Tensor) -> Tensor:
        """x [B, Y, X, D] -> [B, Y', X', D'], grown and pooled where the block does so."""
        if self.dim == self.dim_out:
            return x
        grown = self.proj(self.norm1(x))
        return grown if self.pool is None else self.pool(grown.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def reads(self, arriving: float, leaving: float) -> Reads:
        """What is read: windows at the edge are padded."""
        side = math.isqrt(int(arriving))
        if side * side != arriving:
            raise ValueError(
                f"a HieraDet's cost is that of square images, but {arriving} tokens are no square"
            )
        window = self.window_size if self.is_windowed else (side, side)
        windows, tokens = math.prod(-(-side // n) for n in window), math.prod(window)
        queries = math.prod(n // s for n, s in zip(window, strides_of(self), strict=True))
        left = math.prod(side // s for s in strides_of(self))
        return Reads(windows * tokens, windows * queries * tokens, windows * queries, left)

    def attended(self, y: Tensor, **_) -> Tensor:
        """What the attention makes of the input of its half."""
        if not self.is_windowed:
            return self.attn(y)
        (Y, X), (high, wide), (down, across) = y.shape[1:3], self.window_size, strides_of(self)
        windows = window_partition(F.pad(y, (0, 0, 0, -X % wide, 0, -Y % high)), self.window_size)
        Y, X, high, wide = Y // down, X // across, high // down, wide // across
        out = window_unpartition(self.attn(windows), (high, wide), (Y + -Y % high, X + -X % wide))
        return out[:, :Y, :X]

    def fed(self, y: Tensor) -> Tensor:
        """What the MLP makes of the input of its half."""
        return self.mlp(y.flatten(1, 2)).view_as(y)


class UVCHieraDetBlock(InPooledWindows, UVCBlock, MultiScaleBlock):
    """timm's block of SAM 2's Hiera."""


class CompactHieraDetBlock(InPooledWindows, CompactBlock):
    """The running halves of such a block, and its residual."""

    FULL = UVCHieraDetBlock

    def __init__(self, dense: nn.Module, record, slimming=None, form: str = "grouped"):
        super().__init__(dense, record, slimming, form)
        for name in ("dim", "dim_out", "window_size", "is_windowed", "q_stride"):
            setattr(self, name, getattr(dense, name))
        if "pool" not in self._modules:
            self.pool = None

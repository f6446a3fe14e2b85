"""Blocks of SAM: all of an image's tokens attend to one another, or those of a window.

B images, Y x X tokens of an image, D width.
"""

import math

from timm.models import vision_transformer_sam
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from uvc.layers.block import InARow, Reads, UVCBlock
from uvc.layers.compact_block import CompactBlock


class InSquares(InARow):
    """How the halves of a block read tokens [B, Y, X, D]. Stochastic depth drops images, not windows."""

    def reads(self, arriving: float, leaving: float) -> Reads:
        """What is read: windows at the edge are padded."""
        side = math.isqrt(int(arriving))
        if side * side != arriving:
            raise ValueError(f"a SAM's cost is that of square images, but {arriving} tokens are no square")
        window = self.window_size or side
        windows, N = (-(-side // window)) ** 2, window * window
        terms = windows * N * 2 * window if self.attn.use_rel_pos else 0
        return Reads(windows * N, windows * N * N, windows * N, arriving, terms)

    def attended(self, y: Tensor, **_) -> Tensor:
        """What the attention makes of the input of its half."""
        if not self.window_size:
            return self.attn(y)
        windows, padded = window_partition(y, self.window_size)
        return window_unpartition(self.attn(windows), self.window_size, y.shape[1:3], padded)

    def fed(self, y: Tensor) -> Tensor:
        """What the MLP makes of the input of its half."""
        return self.mlp(y.flatten(1, 2)).view_as(y)


class UVCSamBlock(InSquares, UVCBlock, vision_transformer_sam.Block):
    """timm's block of SAM."""


class CompactSamBlock(InSquares, CompactBlock):
    """The running halves of a block of SAM."""

    FULL = UVCSamBlock

    def __init__(self, dense: nn.Module, record, slimming=None, form: str = "grouped"):
        super().__init__(dense, record, slimming, form)
        self.window_size = dense.window_size

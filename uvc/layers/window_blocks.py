"""Swin Transformers: blocks that attend in windows of an image's tokens, which every other block shifts.

B images, Y x X tokens of an image, D width; N tokens of a window.
"""

import copy
import math

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

from uvc.layers.block import InARow, Reads, UVCBlock
from uvc.layers.compact_block import CompactBlock


class InWindows(InARow):
    """How the halves of a block read tokens [B, Y, X, D]: each window's attend to one another."""

    # timm's own: shift, pad, attend, and back.
    _attn = SwinTransformerBlock._attn
    get_attn_mask = SwinTransformerBlock.get_attn_mask

    def reads(self, arriving: float, leaving: float) -> Reads:
        """What is read: windows at the edge are padded."""
        image = self.feat_size if hasattr(self, "feat_size") else self.input_resolution
        sides = zip(image, self.window_size, strict=True)
        windows, N = math.prod(-(-size // window) for size, window in sides), math.prod(self.window_size)
        return Reads(windows * N, windows * N * N, windows * N, math.prod(image))

    def attended(self, y: Tensor, **_) -> Tensor:
        """What the attention makes of the input of its half."""
        return self._attn(y)

    def fed(self, y: Tensor) -> Tensor:
        """What the MLP makes of the input of its half."""
        return self.mlp(y.flatten(1, 2)).view_as(y)


class UVCSwinBlock(InWindows, UVCBlock, SwinTransformerBlock):
    """timm's block of Swin."""


class UVCSwinV2Block(InWindows, UVCBlock, SwinTransformerV2Block):
    """timm's block of Swin v2."""


class WithNorm(InWindows):
    """Blocks of SwinTransformerV2Cr, of which some end in a norm of their own."""

    get_attn_mask = SwinTransformerV2CrBlock.get_attn_mask

    def stays(self) -> tuple[str, ...]:
        """That norm."""
        return ("norm3",)

    def ended(self, x: Tensor) -> Tensor:
        """What the block gives of what its halves leave."""
        return self.norm3(x)


class UVCSwinCrBlock(WithNorm, UVCBlock, SwinTransformerV2CrBlock):
    """timm's block of SwinTransformerV2Cr."""


class CompactSwinBlock(InWindows, CompactBlock):
    """The running halves of a block of Swin."""

    FULL = UVCSwinBlock
    # Of the dense block's attributes, those that say how windows lie.
    PLACES = ("input_resolution", "window_size", "window_area", "shift_size", "dynamic_mask")

    def __init__(self, dense: nn.Module, record, slimming=None, form: str = "grouped"):
        super().__init__(dense, record, slimming, form)
        for name in self.PLACES:
            setattr(self, name, getattr(dense, name))
        mask = copy.deepcopy(dense.attn_mask) if record.attn else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the mask of shifted windows."""
        weight = self.norm1.weight
        self.attn_mask = self.get_attn_mask(device=weight.device, dtype=weight.dtype)


class CompactSwinV2Block(CompactSwinBlock):
    """The running halves of a block of Swin v2."""

    FULL = UVCSwinV2Block


class CompactSwinCrBlock(WithNorm, CompactSwinBlock):
    """The running halves of a block of SwinTransformerV2Cr, and its norm."""

    FULL = UVCSwinCrBlock
    PLACES = ("feat_size", "window_size", "window_area", "shift_size", "dynamic_mask")

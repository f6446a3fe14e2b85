"""Swin v2 of SwinTransformerV2Cr: cosine attention whose bias an MLP makes of each pair's distance.

N tokens of a window, H heads, h kept heads.
"""

import copy

from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor, nn

from uvc.layers.biased import Unmasked
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.windows import InWindow, UnitLength, Windowed


class _PairBias(UnitLength):
    """The bias, in a dense and in a compact layer."""

    # timm's own.
    _make_pair_wise_relative_positions = WindowMultiHeadAttention._make_pair_wise_relative_positions

    def bias(self, heads: list[int], **positions) -> Tensor:
        """What positions add to the scores of these heads, [1, h, N, N]."""
        area = self.window_size[0] * self.window_size[1]
        return self.meta_mlp(self.relative_coordinates_log)[:, list(heads)].T.reshape(1, -1, area, area)


class CompactCrAttention(InWindow, _PairBias, CompactAttention):
    """The kept heads of SwinTransformerV2Cr's attention, with the positions of all."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.window_size = dense.window_size
        self.logit_scale, self.meta_mlp = copy.deepcopy(dense.logit_scale), copy.deepcopy(dense.meta_mlp)
        distances = copy.deepcopy(dense.relative_coordinates_log)
        self.register_buffer("relative_coordinates_log", distances, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the distances."""
        self._make_pair_wise_relative_positions()


class UVCCrAttention(Windowed, _PairBias, Unmasked, WindowMultiHeadAttention):
    """timm's WindowMultiHeadAttention, of which heads and v dims can be left out."""

    SMALL = CompactCrAttention
    OUTSIDE = "cosine attention in windows"

    def ties(self) -> dict[str, str]:
        """The length of q and of k is over all their dims."""
        return {"qk": "cosine attention divides by a length, which is over all of them"}

    def half_macs(self, tokens: int) -> int:
        """Multiply-accumulates of an image that stay whatever is removed: the positions' own MLP."""
        mlp = self.meta_mlp
        return self.relative_coordinates_log.shape[0] * (mlp.fc1.weight.numel() + mlp.fc2.weight.numel())

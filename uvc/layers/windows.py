"""Attention in windows of an image's tokens (Swin Transformers).

B images, W windows of N tokens in each, D width, H heads, K head dim; h kept heads.
"""

import copy
import math

import torch.nn.functional as F
import uvc_kernels
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from uvc.layers.biased import CompactBeit, Unmasked, _BeitBias
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.heads import Heads, Source, with_biases


class InWindow(nn.Module):
    """Attention in windows [B * W, N, D], on the fly or compact."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B * W, N, D] -> [B * W, N, D]; mask [W, N, N] is added to the scores."""
        return super().forward(x, mask=mask, windows=x.shape[0])

    def bias(self, heads: list[int], mask: Tensor | None = None, windows: int = 1) -> Tensor:
        """What positions, and the mask of each window, add to the scores of these heads."""
        own = super().bias(heads)
        return own if mask is None else own + mask.repeat(windows // mask.shape[0], 1, 1)[:, None]


class Windowed(InWindow):
    """Heads in windows; stands before `Heads`."""

    @property
    def head_dim(self) -> int:
        """K, the dims of a head."""
        return self.proj.in_features // self.num_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B * W, N, D] -> [B * W, N, D]; mask [W, N, N] is added to the scores."""
        if self.is_dense:
            return super(Heads, self).forward(x, mask=mask)
        return super().forward(x, mask)


class CompactWindowAttention(InWindow, CompactBeit):
    """The kept heads of Swin's attention, with the table of all."""

    def init_non_persistent_buffers(self) -> None:
        """Compute the places of the table's entries."""
        index = swin_transformer.get_relative_position_index(*self.window_size)
        self.relative_position_index.copy_(index)


class UVCWindowAttention(Windowed, _BeitBias, Unmasked, swin_transformer.WindowAttention):
    """timm's WindowAttention of Swin, of which heads, q/k dims and v dims can be left out."""

    SMALL = CompactWindowAttention
    OUTSIDE = "attention in windows"

    def placed(
        self, x: Tensor, heads: list[int], mask: Tensor | None = None, windows: int = 1
    ) -> uvc_kernels.Positions:
        """The bias of these heads, and the mask of each window; images that follow have the same."""
        return uvc_kernels.Positions(bias=self.bias(heads, mask, 1 if mask is None else len(mask)))


class UnitLength(nn.Module):
    """Swin v2: q and k of one length, and a factor of each head."""

    scale = 1.0

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, K] as they are multiplied."""
        factors = self.logit_scale[list(heads)].clamp(max=math.log(100.0)).exp().view(-1, 1, 1)
        return F.normalize(q, dim=-1) * factors, F.normalize(k, dim=-1)


class _Cosine(UnitLength):
    """A bias that an MLP makes of the distances there are in a window."""

    def bias(self, heads: list[int], **positions) -> Tensor:
        """What positions add to the scores of these heads, [1, h, N, N]."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)[:, list(heads)]
        return 16 * F.embedding(self.relative_position_index, table).permute(2, 0, 1)[None].sigmoid()

    # timm's own.
    _make_pair_wise_relative_positions = (
        swin_transformer_v2.WindowAttention._make_pair_wise_relative_positions
    )


class CompactCosineAttention(InWindow, _Cosine, CompactAttention):
    """The kept heads of Swin v2's attention, with the positions of all."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.window_size, self.pretrained_window_size = dense.window_size, dense.pretrained_window_size
        self.logit_scale, self.cpb_mlp = copy.deepcopy(dense.logit_scale), copy.deepcopy(dense.cpb_mlp)
        for name in ("relative_coords_table", "relative_position_index"):
            self.register_buffer(name, copy.deepcopy(getattr(dense, name)), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute distances, and the places of the bias's entries."""
        weight = self.proj.weight
        found = self._make_pair_wise_relative_positions(device=weight.device, dtype=weight.dtype)
        self.relative_coords_table.copy_(found[0])
        self.relative_position_index.copy_(found[1])


class UVCCosineAttention(Windowed, _Cosine, Unmasked, swin_transformer_v2.WindowAttention):
    """timm's WindowAttention of Swin v2, of which heads and v dims can be left out."""

    SMALL = CompactCosineAttention
    OUTSIDE = "cosine attention in windows"

    def ties(self) -> dict[str, str]:
        """The length of q and of k is over all their dims."""
        return {"qk": "cosine attention divides by a length, which is over all of them"}

    def half_macs(self, tokens: int) -> int:
        """Multiply-accumulates of an image that stay whatever is removed: the positions' own MLP."""
        places = self.relative_coords_table.shape[1:3].numel()
        return places * sum(layer.weight.numel() for layer in (self.cpb_mlp[0], self.cpb_mlp[2]))

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from; biases of q and v are parameters of the layer."""
        q, k, v = super().sources()
        return q._replace(bias=self.q_bias, bias_row=0), k, v._replace(bias=self.v_bias, bias_row=0)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B * W, N, A], from the children."""
        return super().projected(x) if self.q_bias is None else with_biases(self, x)

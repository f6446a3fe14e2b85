"""Attention that adds a learnt bias of relative positions to the scores (BEiT, relative-position ViTs).

B batch, N tokens, H heads; h kept heads.
"""

import copy
from collections.abc import Sequence

import torch.nn.functional as F
import uvc_kernels
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import gen_relative_position_index
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from uvc.layers.compact_attention import CompactAttention, added
from uvc.layers.heads import Heads, Source, with_biases
from uvc.layers.small_weights import through_part


class Unmasked(Heads):
    """Heads of blocks that pass no attention mask on."""

    slims = False

    def _dense(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        return super(Heads, self).forward(x, **positions)


class Biased(Unmasked):
    """Heads with a bias of the scores alone."""

    def placed(self, x: Tensor, heads: list[int], **positions) -> uvc_kernels.Positions:
        """The bias of these heads."""
        return uvc_kernels.Positions(bias=self.bias(heads, **positions))


class _BeitBias(nn.Module):
    """The bias of BEiT, from a table of the layer and one that layers share."""

    def bias(self, heads: Sequence[int], shared_rel_pos_bias: Tensor | None = None) -> Tensor | None:
        """What positions add to the scores of these heads, [1 or B, h, N, N]; None: nothing."""
        heads, own = list(heads), None
        if self.relative_position_bias_table is not None:
            index = self.relative_position_index
            own = F.embedding(index, self.relative_position_bias_table[:, heads]).permute(2, 0, 1)[None]
        shared = None if shared_rel_pos_bias is None else shared_rel_pos_bias[..., heads, :, :]
        return added(own, shared)

    def positioned(
        self, q: Tensor, k: Tensor, heads: Sequence[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """Positions add to the scores alone."""
        return q, k


class CompactBeit(_BeitBias, CompactAttention):
    """The kept heads of BEiT's attention, with the table of all."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.relative_position_bias_table = copy.deepcopy(dense.relative_position_bias_table)
        index = dense.relative_position_index
        self.register_buffer("relative_position_index", copy.deepcopy(index), persistent=False)
        self.window_size = dense.window_size

    def init_non_persistent_buffers(self) -> None:
        """Compute the places of the table's entries."""
        self.relative_position_index.copy_(gen_relative_position_index(self.window_size))


class UVCBeitAttention(_BeitBias, Biased, BeitAttention):
    """timm's attention of BEiT, of which heads, q/k dims and v dims can be left out."""

    SMALL = CompactBeit
    OUTSIDE = "a bias of relative positions"

    @property
    def head_dim(self) -> int:
        """K, the dims of a head."""
        return self.proj.in_features // self.num_heads

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from; biases of q and v are parameters of the layer."""
        q, k, v = super().sources()
        return q._replace(bias=self.q_bias, bias_row=0), k, v._replace(bias=self.v_bias, bias_row=0)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        return super().projected(x) if self.q_bias is None else with_biases(self, x)


class _RelPosBias(nn.Module):
    """The bias of relative-position ViTs, from a module of the layer or one that layers share."""

    def bias(self, heads: Sequence[int], shared_rel_pos: Tensor | None = None) -> Tensor | None:
        """What positions add to the scores of these heads, [1, h, N, N]; None: nothing."""
        whole = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return None if whole is None else whole[..., list(heads), :, :]

    def positioned(
        self, q: Tensor, k: Tensor, heads: Sequence[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """Positions add to the scores alone."""
        return through_part(self, "q_norm", q), through_part(self, "k_norm", k)


class CompactRelPos(_RelPosBias, CompactAttention):
    """The kept heads of attention with relative positions, with the positions of all."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.rel_pos = copy.deepcopy(dense.rel_pos)


class UVCRelPosAttention(_RelPosBias, Biased, RelPosAttention):
    """timm's RelPosAttention, of which heads, q/k dims and v dims can be left out."""

    SMALL = CompactRelPos
    OUTSIDE = "a bias of relative positions"

    def half_macs(self, tokens: int) -> int:
        """Multiply-accumulates of an image that stay whatever is removed: the positions' own MLP."""
        mlp = getattr(self.rel_pos, "mlp", None)
        if mlp is None:
            return 0
        places = self.rel_pos.rel_coords_log.shape[:2].numel()
        return places * (mlp.fc1.weight.numel() + mlp.fc2.weight.numel())

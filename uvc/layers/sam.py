"""Attention whose scores get relative positions read off the queries, along height and width (SAM).

B images or windows of Y x X tokens, N of them, D width, H heads, K head dim; h kept heads.
"""

import copy

from timm.models import vision_transformer_sam
from torch import Tensor, nn

from uvc.layers.biased import Unmasked
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.heads import Heads


class _Decomposed(nn.Module):
    """The attention, on the fly or compact."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Y, X, D] -> [B, Y, X, D]."""
        return super().forward(x.flatten(1, 2), size=x.shape[1:3]).view_as(x)

    def relative(self, q: Tensor, size: tuple[int, int]) -> Tensor | None:
        """What positions add to the scores of queries [B, h, N, K]: [B, h, N, N]."""
        if not self.use_rel_pos:
            return None
        found = vision_transformer_sam.get_decomposed_rel_pos_bias(
            q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, size, size
        )
        return found.view(*q.shape[:3], -1)


class CompactSamAttention(_Decomposed, CompactAttention):
    """The kept heads of SAM's attention, with the positions of all."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.use_rel_pos = dense.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = copy.deepcopy(dense.rel_pos_h), copy.deepcopy(dense.rel_pos_w)


class UVCSamAttention(_Decomposed, Unmasked, vision_transformer_sam.Attention):
    """timm's attention of SAM, of which heads and v dims, and without positions q/k dims, can be left out."""

    SMALL = CompactSamAttention
    OUTSIDE = "a bias read off the queries"

    @classmethod
    def fault(cls, attn: nn.Module) -> str | None:
        """Beside other children: rotary positions, which are of the model."""
        if getattr(attn, "rope", None) is not None:
            return "rope turns q and k in windows; the neurons beside it could go"
        return super().fault(attn)

    def ties(self) -> dict[str, str]:
        """Positions are read off whole queries."""
        if not self.use_rel_pos:
            return super().ties()
        return super().ties() | {"qk": "rel_pos_h and rel_pos_w are multiplied with all of a query"}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Y, X, D] -> [B, Y, X, D]."""
        return super(Heads, self).forward(x) if self.is_dense else super().forward(x)

"""Talking heads (CaiT): linear layers mix the scores of all heads, before the softmax and after it.

B batch, N tokens, H heads.
"""

import copy

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from uvc.layers.biased import Unmasked
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.small_weights import through_part, without_inputs


def talk(attn: nn.Module, scores: Tensor) -> Tensor:
    """What each head of `attn` gives each value, from the scores [B, H, N, N] of all heads."""
    weights = attn.proj_l(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
    return through_part(attn, "attn_drop", attn.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class CompactTalkingHeads(CompactAttention):
    """All heads, over their kept dims."""

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__(dense, record, form)
        self.proj_l, self.proj_w = copy.deepcopy(dense.proj_l), copy.deepcopy(dense.proj_w)

    def scored(self, x: Tensor, slimming: None, *masks, **positions) -> tuple[Tensor, None]:
        """As `forward`; no tokens are ranked."""
        B, N, _ = x.shape
        if not self.groups:
            # What stays whatever is removed is computed, as the cost counts it.
            talk(self, x.new_zeros(B, self.num_heads, N, N))
            return through_part(self, "proj_drop", without_inputs(self.proj, x)), None
        scores, values = x.new_zeros(B, self.num_heads, N, N), []
        for group, parts in zip(self.groups, self._projected(x), strict=True):
            q, k, v = (part.reshape(B, N, len(group.heads), -1).transpose(1, 2) for part in parts)
            found = self.scale * q @ k.transpose(-2, -1)
            scores = scores.index_copy(1, torch.tensor(group.heads, device=x.device), found.to(scores.dtype))
            values.append(v)
        weights = talk(self, scores)
        outputs = [
            (weights[:, list(group.heads)] @ v).transpose(1, 2).reshape(B, N, -1)
            for group, v in zip(self.groups, values, strict=True)
        ]
        return through_part(self, "proj_drop", self.proj(torch.cat(outputs, dim=-1))), None


class UVCTalkingHeads(Unmasked, TalkingHeadAttn):
    """timm's TalkingHeadAttn, of which q/k dims and v dims can be left out, all but one v dim of a head."""

    SMALL = CompactTalkingHeads
    OUTSIDE = "talking between heads"

    @property
    def head_dim(self) -> int:
        """K, the dims of a head."""
        return self.proj.in_features // self.num_heads

    def ties(self) -> dict[str, str]:
        """The scores of all heads are mixed."""
        return {"heads": "proj_l and proj_w mix the scores of all of them"}

    def half_macs(self, tokens: int) -> int:
        """Multiply-accumulates of an image that stay whatever is removed: those that mix heads."""
        return 2 * (tokens * self.num_heads) ** 2

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """There are no positions."""
        return q, k

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: None, is_causal: bool) -> Tensor:
        """The values of all heads, weighted."""
        return talk(self, self.scale * q @ k.transpose(-2, -1)) @ v

    attended_by_children = attended

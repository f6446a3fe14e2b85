"""UVCAttention: timm's Attention that can leave out heads, q/k dims and v dims, and compute only the rest.

B batch, N tokens, D width, H heads, K head dim, A = H*K.
"""

import functools

import torch
import torch.nn.functional as F
import uvc_kernels
from timm.layers import Attention
from torch import Tensor, nn
from uvc_kernels.warn_once import warn_once

from uvc.layers.children import DROPS, drop_rate, is_plain, is_untouched, say_called, watched
from uvc.layers.heads import Heads
from uvc.layers.token_pruning import Slimming, row_scores


class UVCAttention(Heads, Attention):
    """Multi-head self attention with timm's arguments, state_dict keys and, while dense, timm's own forward.

    One fast op computes the kept heads, where there is no norm, gate, mask or dropout inside.
    """

    @functools.wraps(Attention.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    @property
    def reads_weights(self) -> bool:
        """Whether the op may read the children's weights, as calling the children would do no more."""
        children = self._modules
        return (
            is_plain(children["qkv"])
            and is_plain(children["proj"])
            and type(children["q_norm"]) is type(children["k_norm"]) is type(children["norm"]) is nn.Identity
            and is_untouched(children["q_norm"])
            and is_untouched(children["k_norm"])
            and is_untouched(children["norm"])
            and type(children["attn_drop"]) in DROPS
            and is_untouched(children["attn_drop"])
            and children.get("gate") is None
            and not watched()
        )

    def packing(self) -> tuple[list, list, list, list]:
        """What `uvc_kernels.gather` takes to pack the kept weights; not for a dense layer."""
        weight = self.qkv.weight
        return uvc_kernels.attention_packing(
            weight, self.qkv.bias, self.proj.weight, self.proj.bias, self.kept(weight.device)
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; `attn_mask` and `is_causal` as in timm."""
        if self._masks is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        fast = self.reads_weights
        if x.is_meta or not (fast or self.gathers):
            say_called(self, x)
            return self._called(x, attn_mask, is_causal)
        dropout = drop_rate(self.attn_drop)
        if fast and attn_mask is None and not is_causal and dropout == 0.0:
            weights = (self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)
            kept = self.kept(weights[0].device)
            return self.proj_drop(
                uvc_kernels.attention(x, *weights, kept, self.scale, self._packed, self._recompute)
            )
        reason = "attention dropout" if dropout else "an attention mask" if fast else self.OUTSIDE
        warn_once(f"UVCAttention: {reason} is outside the fast op; plain torch computes the kept heads")
        return self._gathered(x, attn_mask, is_causal)

    @torch.no_grad()
    def token_scores(self, x: Tensor, slimming: Slimming) -> Tensor | None:
        """How much attention each token of x [B, N, D] gets from the one that ranks, over the kept heads.

        [B, N], without gradient; None when no q/k dim is kept, as then all are equal. Scores are
        q (Wk x)^T = (q Wk) x^T: no keys are computed again, and a bias on them would add to all alike. A
        child `qkv` that is more than its weights is called for them, once more than `forward` does.
        """
        if not self.reads_weights:
            return super().token_scores(x, slimming)
        B, _, D = x.shape
        weight = self.qkv.weight[: 2 * self.dims].view(2, self.num_heads, self.head_dim, D)
        bias = None if self.qkv.bias is None else self.qkv.bias[: self.dims]
        q = F.linear(slimming.reader(x), weight[0].flatten(0, 1), bias).view(B, *weight.shape[1:3])
        if self._masks is not None:
            kept = self.kept(weight.device)
            if kept.qk.shape[0] == 0:
                return None
            q = q.masked_fill(kept.whole_rows[0] < 0, 0.0)
        reads = torch.einsum("bhd,hdw->bhw", self.scale * q, weight[1].to(q.dtype))
        return row_scores(reads @ x.transpose(1, 2).to(q.dtype))

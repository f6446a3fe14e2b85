"""UVCAttention: timm's Attention that can leave out heads, q/k dims and v dims, and compute only the rest.

B batch, N tokens, D width, H heads, K head dim, A = H*K; h kept heads, E the longest kept head.
"""

import functools

import torch
import torch.nn.functional as F
import uvc_kernels
from timm.layers import Attention
from torch import Tensor, nn
from uvc_kernels.warn_once import warn_once

from uvc.layers.children import DROPS, drop_rate, is_plain, is_untouched, linear_fault, say_called, watched
from uvc.layers.prunable import Prunable, device_of
from uvc.layers.token_pruning import Slimming, row_scores


class UVCAttention(Prunable, Attention):
    """Multi-head self attention with timm's arguments, state_dict keys and, while dense, timm's own forward.

    A structure (`set_kept`) removes heads, q/k dims and v dims without touching the weights: the output and
    every gradient equal those of the dense layer in which the removed contributions are absent.
    """

    @functools.wraps(Attention.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    def set_kept(self, qk: Tensor | None, v: Tensor | None) -> None:
        """Keep the q/k dims and v dims marked in the bool masks [H, K] `qk` and `v`; None keeps all.

        A head without kept v dims is removed, and its q/k dims do not count. A kept head without q/k dims
        attends uniformly. ValueError for a mask of another shape or dtype, or for a layer whose normalisation
        forbids removal.
        """
        whole = (self.num_heads, self.head_dim)
        qk, v = (torch.ones(whole, dtype=torch.bool, device="cpu") if m is None else m.cpu() for m in (qk, v))
        for name, mask in (("qk", qk), ("v", v)):
            if mask.dtype != torch.bool or mask.shape != whole:
                got = f"{mask.dtype} {list(mask.shape)}"
                raise ValueError(f"{name} must be a bool mask of shape {list(whole)}, got {got}")
        qk, v = qk & v.any(1, keepdim=True), v.clone()
        if qk.all() and v.all():
            return self._be_dense()
        if fault := attention_fault(self):
            raise ValueError(f"cannot remove parts of this UVCAttention: {fault}")
        self._masks = (qk, v)
        self._kept = self._index(device_of(self))

    def _index(self, device: torch.device) -> uvc_kernels.KeptHeads:
        return uvc_kernels.kept_heads(*self._masks, device)

    @property
    def reads_weights(self) -> bool:
        """Whether the layer may read its children's weights, as calling the children would do no more."""
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
            weight, self.qkv.bias, self.proj.weight, self.kept(weight.device)
        )

    @property
    def kept_qk(self) -> Tensor:
        """Bool mask [H, K] of the kept q/k dims, on the CPU; the row of a removed head is False."""
        return self._mask(0)

    @property
    def kept_v(self) -> Tensor:
        """Bool mask [H, K] of the kept v dims, on the CPU."""
        return self._mask(1)

    def _mask(self, which: int) -> Tensor:
        if self._masks is None:
            return torch.ones(self.num_heads, self.head_dim, dtype=torch.bool, device="cpu")
        return self._masks[which].clone()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; `attn_mask` and `is_causal` as in timm."""
        if self._masks is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if x.is_meta or not self.reads_weights:
            say_called(self, x)
            return self._called(x, attn_mask, is_causal)
        dropout = drop_rate(self.attn_drop)
        if attn_mask is None and not is_causal and dropout == 0.0:
            weights = (self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)
            kept = self.kept(weights[0].device)
            return self.proj_drop(
                uvc_kernels.attention(x, *weights, kept, self.scale, self._packed, self._recompute)
            )
        reason = "attention dropout" if dropout else "an attention mask"
        warn_once(f"UVCAttention: {reason} is outside the fast op; plain torch computes the kept heads")
        return self.proj_drop(self._gathered(x, attn_mask, is_causal, dropout))

    @torch.no_grad()
    def token_scores(self, x: Tensor, slimming: Slimming) -> Tensor | None:
        """How much attention each token of x [B, N, D] gets from the one that ranks, over the kept heads.

        [B, N], without gradient; None when no q/k dim is kept, as then all are equal. Scores are
        q (Wk x)^T = (q Wk) x^T: no keys are computed again, and a bias on them would add to all alike. A
        child `qkv` that is more than its weights is called for them, once more than `forward` does.
        """
        if not self.reads_weights:
            if not self.kept_qk.any():
                return None
            q, k, _ = self._heads(x)
            return row_scores((self.scale * slimming.reader(q) @ k.transpose(-2, -1)).squeeze(2))
        B, _, D = x.shape
        weight = self.qkv.weight[: 2 * self.attn_dim].view(2, self.num_heads, self.head_dim, D)
        bias = None if self.qkv.bias is None else self.qkv.bias[: self.attn_dim]
        q = F.linear(slimming.reader(x), weight[0].flatten(0, 1), bias).view(B, *weight.shape[1:3])
        if self._masks is not None:
            kept = self.kept(weight.device)
            if kept.qk.shape[0] == 0:
                return None
            q = q.masked_fill(kept.whole_rows[0] < 0, 0.0)
        reads = torch.einsum("bhd,hdw->bhw", self.scale * q, weight[1].to(q.dtype))
        return row_scores(reads @ x.transpose(1, 2).to(q.dtype))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, K] of x [B, N, D] from the children; removed q/k dims are zero."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        if self._masks is not None:
            removed = self.kept(x.device).whole_rows[0, :, None] < 0
            q, k = q.masked_fill(removed, 0.0), k.masked_fill(removed, 0.0)
        return q, k, v

    def _called(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Every child is called on all heads, and what is removed is zero: no faster than dense."""
        B, N, _ = x.shape
        q, k, v = self._heads(x)
        if self.fused_attn and type(self.attn_drop) in DROPS and is_untouched(self.attn_drop):
            dropout = drop_rate(self.attn_drop)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
            )
        else:
            scores = masked(self.scale * q @ k.transpose(-2, -1), attn_mask, is_causal)
            out = self.attn_drop(scores.softmax(-1)) @ v
        out = self.norm(out.transpose(1, 2).reshape(B, N, self.attn_dim))
        if (gate := getattr(self, "gate", None)) is not None:
            out = out * gate(x).sigmoid()
        removed = self.kept(x.device).whole_columns.flatten() < 0
        return self.proj_drop(self.proj(out.masked_fill(removed, 0.0)))

    def _gathered(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
        """The kept heads in plain torch, each padded with zeros to the longest kept head."""
        B, N, _ = x.shape
        qk_mask, v_mask = self._masks
        heads = v_mask.any(1).nonzero().flatten()
        h = len(heads)
        if h == 0:
            return F.linear(x.new_zeros(B, N, 0), self.proj.weight[:, :0], self.proj.bias)
        qk_mask, v_mask = qk_mask[heads], v_mask[heads]
        E = max(1, int(qk_mask.sum(1).max()), int(v_mask.sum(1).max()))
        # A stable sort puts the kept dims of a head first; the padding behind is multiplied by exact zero.
        qk_dim, v_dim = (
            m.int().argsort(dim=1, descending=True, stable=True)[:, :E] for m in (qk_mask, v_mask)
        )
        qk_on, v_on = qk_mask.gather(1, qk_dim).flatten(), v_mask.gather(1, v_dim).flatten()
        first = heads[:, None] * self.head_dim
        qk_row, v_row = (first + qk_dim).flatten(), (first + v_dim).flatten()
        weight = self.qkv.weight
        rows = torch.cat([qk_row, qk_row + self.attn_dim, v_row + 2 * self.attn_dim]).to(weight.device)
        on = torch.cat([qk_on, qk_on, v_on]).to(weight)
        bias = None if self.qkv.bias is None else self.qkv.bias[rows] * on
        q, k, v = F.linear(x, weight[rows] * on[:, None], bias).reshape(B, N, 3, h, E).permute(2, 0, 3, 1, 4)
        mask = heads_of_mask(attn_mask, heads.tolist(), self.num_heads)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        out = out.transpose(1, 2).reshape(B, N, h * E)
        return F.linear(out, self.proj.weight[:, v_row.to(weight.device)], self.proj.bias)


def heads_of_mask(attn_mask: Tensor | None, heads: list[int], num_heads: int) -> Tensor | None:
    """The part of an attention mask [..., H or 1, N, N] that concerns the kept heads."""
    if attn_mask is None or attn_mask.dim() < 3 or attn_mask.shape[-3] != num_heads or num_heads == 1:
        return attn_mask
    return attn_mask[..., heads, :, :]


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores [B, H, N, N] under a bool mask (True stays), one that is added, or the causal one."""
    if is_causal:
        N = scores.shape[-1]
        future = torch.ones(N, N, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf"))
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def attention_fault(attn: Attention) -> str | None:
    """Why parts of `attn` cannot be removed, naming the child that forbids it; None when they can.

    A UVCAttention calls the children that it cannot read, so these may be any that act as linear layers.
    """
    for child in ("q_norm", "k_norm", "norm"):
        module = getattr(attn, child, None)
        if not isinstance(module, nn.Identity | None):
            return f"{child} is a {type(module).__name__}, whose statistics change when dims are removed"
    if getattr(attn, "gate", None) is not None:
        return "gate is a gate on the attention output, which has no kept form"
    return linear_fault(attn, "qkv", "proj")

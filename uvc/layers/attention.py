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
from uvc.layers.compact_layers import CompactAttention, attend, heads_of_mask, masked
from uvc.layers.prunable import Part, Prunable, device_of, rows
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
        if fault := attention_fault(self) or self.torn((qk, v)):
            raise ValueError(f"cannot remove parts of this {type(self).__name__}: {fault}")
        self._masks = (qk, v)
        self._kept = self._index(device_of(self))

    def ties(self) -> dict[str, str]:
        """A norm of q and k ties the dims of a head, one of the output all heads and v dims."""
        found = {}
        for name, families in (("q_norm", ["qk"]), ("k_norm", ["qk"]), ("norm", ["heads", "v"])):
            norm = getattr(self, name)
            if type(norm) is not nn.Identity:
                why = f"{name} is a {type(norm).__name__}, whose statistics are over all of them"
                found |= dict.fromkeys(families, why)
        return found

    def whole(self, masks: tuple[Tensor, Tensor]) -> dict[str, bool]:
        """For every family whether the masks keep all its units, or no unit at all."""
        qk, v = masks
        kept = v.any(1)
        flags = {"heads": kept, "qk": qk[kept], "v": v[kept]}
        return {family: not kept.any() or bool(flag.all()) for family, flag in flags.items()}

    def parts(self) -> list[Part]:
        """A q/k dim is a row of q and one of k; a v dim one of v and of the gate, and a column of proj."""
        A = self.attn_dim
        found = [Part("v", self.proj.weight, 0, A, 1, True)]
        for i, (family, gates) in enumerate((("qk", True), ("qk", False), ("v", False))):
            found += rows(family, self.qkv, i * A, A, gates)
        return found if self._gate is None else [*found, *rows("v", self._gate, 0, A)]

    @property
    def _gate(self) -> nn.Module | None:
        return self._modules.get("gate")

    @property
    def free_bases(self) -> tuple[str, ...]:
        """Families whose dims stand for themselves in no other place, so that each head may mix them."""
        tied = {*self.ties(), *(["v"] if self._gate is not None else [])}
        return tuple(family for family in ("qk", "v") if family not in tied)

    def compacted(self, record) -> nn.Module:
        """A copy of what `record`, a structure's entry, keeps, in plain torch."""
        return CompactAttention(self, record)

    def _index(self, device: torch.device) -> uvc_kernels.KeptHeads:
        return uvc_kernels.kept_heads(*self._masks, device)

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

    @property
    def gathers(self) -> bool:
        """Whether plain torch may read the weights of the linear children, and call the norms."""
        children = self._modules
        return (
            all(is_plain(children[name]) for name in ("qkv", "proj"))
            and (self._gate is None or is_plain(self._gate))
            and type(children["attn_drop"]) in DROPS
            and is_untouched(children["attn_drop"])
            and not watched()
            and self.torn() is None
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
        reason = "attention dropout" if dropout else "an attention mask" if fast else "a norm or a gate"
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
        qk_row, qk_on = padded_rows(heads, qk_mask)
        v_row, v_on = padded_rows(heads, v_mask)
        weight, A = self.qkv.weight, self.attn_dim
        rows = torch.cat([qk_row, qk_row + A, v_row + 2 * A]).to(weight.device)
        on = torch.cat([qk_on, qk_on, v_on]).to(weight)
        bias = None if self.qkv.bias is None else self.qkv.bias[rows] * on
        parts = F.linear(x, weight[rows] * on[:, None], bias).split(
            [len(qk_row), len(qk_row), len(v_row)], dim=-1
        )
        q, k, v = (part.reshape(B, N, h, -1).transpose(1, 2) for part in parts)
        q, k = self.q_norm(q), self.k_norm(k)
        mask = heads_of_mask(attn_mask, heads.tolist(), self.num_heads)
        out = attend(q, k, v, self.scale, mask, is_causal, dropout)
        out = self.norm(out.transpose(1, 2).reshape(B, N, -1))
        if (gate := self._gate) is not None:
            # Of padded dims the output is zero, whatever their gate.
            bias = None if gate.bias is None else gate.bias[v_row.to(weight.device)]
            out = out * F.linear(x, gate.weight[v_row.to(weight.device)], bias).sigmoid()
        return F.linear(out, self.proj.weight[:, v_row.to(weight.device)], self.proj.bias)


def padded_rows(heads: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the kept dims of these heads by the bool mask [H, K], each head's padded to the longest, and
    which of them are kept: both [h * E].
    """
    kept = mask[heads]
    longest = max(1, int(kept.sum(1).max()))
    # A stable sort puts the kept dims of a head first.
    dims = kept.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return (heads[:, None] * mask.shape[1] + dims).flatten(), kept.gather(1, dims).flatten()


def attention_fault(attn: Attention) -> str | None:
    """Why parts of `attn` cannot be removed, naming the child that forbids it; None when they can.

    A UVCAttention calls the children that it cannot read, so these may be any that act as linear layers.
    """
    gate = () if getattr(attn, "gate", None) is None else ("gate",)
    return linear_fault(attn, "qkv", "proj", *gate)

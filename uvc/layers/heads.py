"""Heads: what every attention shares that can leave out heads, q/k dims and v dims.

B batch, N tokens, D width, H heads, K head dim, A = H*K; h kept heads, E the longest kept head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import uvc_kernels
from torch import Tensor, nn
from uvc_kernels.warn_once import warn_once

from uvc.layers.children import DROPS, drop_rate, is_plain, is_untouched, linear_fault, say_called, watched
from uvc.layers.columns import columns_of
from uvc.layers.compact_attention import CompactAttention, added, attend, heads_of_mask, masked
from uvc.layers.prunable import Part, Prunable, device_of, rows
from uvc.layers.token_pruning import Slimming, row_scores

QKV = (("qk", True), ("qk", False), ("v", False))


class Source(NamedTuple):
    """Where q, k or v of all heads comes from: A rows of a weight, and of a bias if there is one."""

    weight: Tensor
    row: int
    bias: Tensor | None
    bias_row: int = 0


class Heads(Prunable):
    """A parent before timm's attention, which runs while nothing is removed.

    A structure (`set_kept`) removes heads, q/k dims and v dims without touching the weights: the output and
    every gradient equal those of the dense layer in which the removed contributions are absent. Where the
    children are what timm made, plain torch multiplies for the kept heads alone. A kind of attention says
    where q, k and v come from (`sources`, `projected`), and, with its compact form, what positions do
    (`positioned`, `bias`).
    """

    # Linear children, of which some kinds have only some.
    LINEARS = ("qkv", "q_proj", "k_proj", "v_proj", "gate", "proj")
    SMALL: type[CompactAttention] = CompactAttention
    # What is outside the fast op, in messages.
    OUTSIDE = "a norm or a gate"
    # Whether its tokens may be left out: nothing in it stands for their places.
    slims = True

    @property
    def dims(self) -> int:
        """A, the dims of all heads."""
        return self.num_heads * self.head_dim

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from."""
        A = self.dims
        return tuple(Source(self.qkv.weight, i * A, self.qkv.bias, i * A) for i in range(3))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A], from the children."""
        return self.qkv(x).chunk(3, dim=-1)

    def positioned(
        self, q: Tensor, k: Tensor, heads: list[int], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, E] as they are multiplied; dims [h, E], None: all as they come."""
        return self.q_norm(q), self.k_norm(k)

    def pairs(self) -> Tensor | None:
        """The q/k dims of a head that go together [K / 2, 2]; None where each goes alone."""
        return None

    def multiples(self) -> dict[str, int]:
        """Pairs of q/k dims go as one."""
        return {} if self.pairs() is None else {"qk": 2}

    def torn(self, masks: tuple[Tensor, ...] | None = None) -> str | None:
        """Why the units in these masks (None: its own) cannot be all that is kept; None where they can."""
        masks, pairs = self._masks if masks is None else masks, self.pairs()
        if masks is not None and pairs is not None:
            one, other = masks[0][:, pairs].unbind(-1)
            if not torch.equal(one, other):
                return f"its q/k dims go in pairs, such as {tuple(pairs[0].tolist())}, which positions turn"
        return super().torn(masks)

    def answered(self, x: Tensor) -> Tensor:
        """As many tokens of x [B, N, D] as the attention gives."""
        return x

    def bias(self, heads: list[int], **positions) -> Tensor | None:
        """What positions add to the scores of these heads, [..., h, N, N]; None: nothing."""
        return None

    def relative(self, q: Tensor, **positions) -> Tensor | None:
        """What positions add to the scores of queries [B, h, N, E], read off these; None: nothing."""
        return None

    def set_kept(self, qk: Tensor | None, v: Tensor | None) -> None:
        """Keep the q/k dims and v dims marked in the bool masks [H, K] `qk` and `v`; None keeps all.

        A head without kept v dims is removed, and its q/k dims do not count. A kept head without q/k dims
        attends uniformly. ValueError for a mask of another shape or dtype, or one that removes what is tied.
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
        if fault := self.fault(self) or self.torn((qk, v)):
            raise ValueError(f"cannot remove parts of this {type(self).__name__}: {fault}")
        self._masks = (qk, v)
        self._kept = self._index(device_of(self))

    def ties(self) -> dict[str, str]:
        """A norm of q and k ties the dims of a head, one of the output all heads and v dims."""
        found = {}
        for name, families in (("q_norm", ["qk"]), ("k_norm", ["qk"]), ("norm", ["heads", "v"])):
            norm = self._modules.get(name)
            if norm is not None and type(norm) is not nn.Identity:
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
        A, found, biases = self.dims, [Part("v", *columns_of(self.proj), self.dims, 1, True)], []
        for (family, gates), source in zip(QKV, self.sources(), strict=True):
            found.append(Part(family, source.weight, source.row, A, 0, gates))
            if source.bias is not None:
                biases.append(Part(family, source.bias, source.bias_row, A, 0, gates))
        # A group's norm is summed in this order, to whose last bit a search is sensitive.
        found += biases
        return found if self._gate is None else [*found, *rows("v", self._gate, 0, A)]

    @property
    def _gate(self) -> nn.Module | None:
        return self._modules.get("gate")

    @property
    def free_bases(self) -> tuple[str, ...]:
        """Families whose dims stand for themselves in no other place, so that each head may mix them."""
        tied = {*self.ties(), *(["v"] if self._gate is not None else [])}
        return tuple(family for family in ("qk", "v") if family not in tied)

    def compacted(self, record, form: str = "grouped") -> nn.Module:
        """A copy of what `record`, a structure's entry, keeps, in plain torch, in one of `FORMS`."""
        return self.SMALL(self, record, form)

    def _index(self, device: torch.device) -> uvc_kernels.KeptHeads:
        return uvc_kernels.kept_heads(*self._masks, device)

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

    @classmethod
    def fault(cls, attn: nn.Module) -> str | None:
        """Why parts of `attn`, timm's or one of these, cannot be removed; None when they can.

        One of these calls the children that it cannot read, so these may be any that act as linear layers.
        """
        return linear_fault(attn, *(name for name in cls.LINEARS if getattr(attn, name, None) is not None))

    @property
    def reads_weights(self) -> bool:
        """Whether a fast op may read the children's weights; there is none for most kinds."""
        return False

    @property
    def gathers(self) -> bool:
        """Whether plain torch may read the weights of the linear children, and call the norms."""
        children = self._modules
        linears = (children.get(name) for name in self.LINEARS)
        return (
            all(is_plain(linear) for linear in linears if linear is not None)
            and type(children["attn_drop"]) in DROPS
            and is_untouched(children["attn_drop"])
            and not watched()
            and self.torn() is None
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; `attn_mask`, `is_causal` and positions as in timm."""
        if self._masks is None:
            return self._dense(x, attn_mask, is_causal, **positions)
        if x.is_meta or not self.gathers:
            say_called(self, x)
            return self._called(x, attn_mask, is_causal, **positions)
        if attn_mask is None and not is_causal and (placed := self._placed(x, **positions)) is not None:
            weights = (*fused(self.sources(), self.dims), self.proj.weight, self.proj.bias)
            kept = self.kept(weights[0].device)
            return self.proj_drop(
                uvc_kernels.attention_with_positions(x, *weights, kept, self.scale, placed, self._recompute)
            )
        outside = f"{self.OUTSIDE} is outside the fast op"
        warn_once(f"{type(self).__name__}: {outside}; plain torch computes the kept heads")
        return self._gathered(x, attn_mask, is_causal, **positions)

    def _placed(self, x: Tensor, **positions) -> uvc_kernels.Positions | None:
        """What the op that knows of positions takes of them; None where it does not serve."""
        norms = [self._modules.get(name) for name in ("q_norm", "k_norm", "norm")]
        if (
            self._gate is not None
            or any(norm is not None and type(norm) is not nn.Identity for norm in norms)
            or drop_rate(self.attn_drop)
            or not uvc_kernels.kernel_serves(
                "attention_with_positions", x.device, x.dtype, self.kept(x.device)
            )
        ):
            return None
        return self.placed(x, self._masks[1].any(1).nonzero().flatten().tolist(), **positions)

    def placed(self, x: Tensor, heads: list[int], **positions) -> uvc_kernels.Positions | None:
        """What positions do to q, k and scores of these heads, as the op takes it; None: it cannot."""
        return None

    def _dense(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal, **positions)

    @torch.no_grad()
    def token_scores(self, x: Tensor, slimming: Slimming) -> Tensor | None:
        """How much attention each token of x [B, N, D] gets from the one that ranks, over the kept heads.

        [B, N], without gradient; None when no q/k dim is kept, as then all are equal. The children are called
        for them, once more than `forward` does.
        """
        if not self.kept_qk.any():
            return None
        q, k, _ = self._heads(x)
        return row_scores((self.scale * slimming.reader(q) @ k.transpose(-2, -1)).squeeze(2))

    def _heads(self, x: Tensor, **positions) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, K] of x [B, N, D] from the children; removed q/k dims are zero."""
        B, N, _ = x.shape
        parts = self.projected(x)
        q, k, v = (part.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2) for part in parts)
        q, k = self.positioned(q, k, list(range(self.num_heads)), None, **positions)
        if self._masks is not None:
            removed = self.kept(x.device).whole_rows[0, :, None] < 0
            q, k = q.masked_fill(removed, 0.0), k.masked_fill(removed, 0.0)
        return q, k, v

    def _called(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        """Every child is called on all heads, and what is removed is zero: no faster than dense."""
        q, k, v = self._heads(x, **positions)
        mask = added(attn_mask, self.bias(list(range(self.num_heads)), **positions))
        mask = added(mask, self.relative(q, **positions))
        out = self.attended_by_children(q, k, v, mask, is_causal)
        out = out.transpose(1, 2).flatten(2)
        out = self.norm(out) if "norm" in self._modules else out
        out = out if self._gate is None else out * self._gate(x).sigmoid()
        removed = self.kept(x.device).whole_columns.flatten() < 0
        return self.proj_drop(self.proj(out.masked_fill(removed, 0.0)))

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """softmax(scale q k^T + mask) v of some heads, [B, h, N, E]."""
        return attend(q, k, v, self.scale, mask, is_causal, drop_rate(self.attn_drop))

    def attended_by_children(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The same of all heads, where the dropout may be any module."""
        if self.fused_attn and type(self.attn_drop) in DROPS and is_untouched(self.attn_drop):
            return F.scaled_dot_product_attention(
                q, k, v, mask, drop_rate(self.attn_drop), is_causal, scale=self.scale
            )
        scores = masked(self.scale * q @ k.transpose(-2, -1), mask, is_causal)
        return self.attn_drop(scores.softmax(-1)) @ v

    def _gathered(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        """The kept heads in plain torch, each padded with zeros to the longest kept head."""
        B, N, _ = x.shape
        qk_mask, v_mask = self._masks
        heads = v_mask.any(1).nonzero().flatten()
        if len(heads) == 0:
            nothing = self.answered(x).new_zeros(B, self.answered(x).shape[1], 0)
            return self.proj_drop(F.linear(nothing, self.proj.weight[:, :0], self.proj.bias))
        device = self.proj.weight.device
        pairs = self.pairs()
        qk = [t.to(device) for t in padded_rows(heads, qk_mask, pairs)]
        v = [t.to(device) for t in padded_rows(heads, v_mask)]
        parts = gathered_rows(x, self.sources(), (qk, qk, v))
        q, k, v_values = (part.reshape(B, N, len(heads), -1).transpose(1, 2) for part in parts)
        names = heads.tolist()
        dims = None if pairs is None else qk[0].view(len(names), -1) % self.head_dim
        q, k = self.positioned(q, k, names, dims, **positions)
        mask = heads_of_mask(attn_mask, names, self.num_heads)
        mask = added(added(mask, self.bias(names, **positions)), self.relative(q, **positions))
        out = self.attended(q, k, v_values, mask, is_causal)
        out = out.transpose(1, 2).flatten(2)
        out = self.norm(out) if "norm" in self._modules else out
        if (gate := self._gate) is not None:
            # Of padded dims the output is zero, whatever their gate.
            out = (
                out * F.linear(x, gate.weight[v[0]], None if gate.bias is None else gate.bias[v[0]]).sigmoid()
            )
        return self.proj_drop(F.linear(out, self.proj.weight[:, v[0]], self.proj.bias))


def fused(sources: tuple[Source, ...], A: int) -> tuple[Tensor, Tensor | None]:
    """Weight [3A, D] and bias [3A] of q, k and v, in one piece."""
    weight = joined([(s.weight, s.row) for s in sources], A)
    if all(s.bias is None for s in sources):
        return weight, None
    none = weight.new_zeros(A)
    return weight, joined([(none, 0) if s.bias is None else (s.bias, s.bias_row) for s in sources], A)


def joined(parts: list[tuple[Tensor, int]], A: int) -> Tensor:
    """A rows of each tensor from a first row on; rows that follow one another are not copied."""
    whole, first = parts[0]
    if [(t is whole, row) for t, row in parts] == [(True, first + i * A) for i in range(3)]:
        return whole[first : first + 3 * A]
    return torch.cat([t[row : row + A] for t, row in parts])


def with_biases(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, N, A] of an attention whose biases are its own, as timm computes them."""
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    separate = attn.qkv_bias_separate
    return (attn.qkv(x) + bias if separate else F.linear(x, attn.qkv.weight, bias)).chunk(3, dim=-1)


def padded_rows(heads: Tensor, mask: Tensor, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of the kept dims of these heads by the bool mask [H, K], each head's padded to the longest, and
    which of them are kept: both [h * E]. Dims that go in pairs [K / 2, 2] lie side by side.
    """
    units = torch.arange(mask.shape[1])[:, None] if pairs is None else pairs
    kept = mask[heads][:, units[:, 0]]
    longest = max(1, int(kept.sum(1).max()))
    # A stable sort puts the kept units of a head first.
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    on = kept.gather(1, order).repeat_interleave(units.shape[1], 1)
    return (heads[:, None] * mask.shape[1] + units[order].flatten(1)).flatten(), on.flatten()


def gathered_rows(x: Tensor, sources: tuple[Source, ...], kept: tuple) -> tuple[Tensor, ...]:
    """x times rows of the sources in one product, [B, N, rows] for each; rows that are padding give zeros."""
    weight = torch.cat([s.weight[s.row + index] for s, (index, _) in zip(sources, kept, strict=True)])
    on = torch.cat([on for _, on in kept]).to(weight)
    bias = None
    if any(s.bias is not None for s in sources):
        none = x.new_zeros(()).to(weight)
        bias = torch.cat(
            [
                none.expand(len(index)) if s.bias is None else s.bias[s.bias_row + index]
                for s, (index, _) in zip(sources, kept, strict=True)
            ]
        )
        bias = bias * on
    return F.linear(x, weight * on[:, None], bias).split([len(index) for index, _ in kept], dim=-1)

"""Attention after compaction: plain torch on small weights.

B batch, N tokens, D width; h heads of a group, dq and dv the q/k and v dims of each.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.layers.children import drop_rate, product, product_onto, runs_as_it_is, writes_onnx
from uvc.layers.small_weights import (
    PADDING,
    after,
    linear_of,
    select,
    smaller,
    take_parts,
    through_part,
    without_inputs,
)
from uvc.layers.token_pruning import Slimming, row_scores

# How what is kept runs: a product for each group of equal heads; or one for all of them, with zeros up to one
# size, and neurons with zeros up to a multiple.
FORMS = ("grouped", "padded")

# Of dims that heads are padded to: rows of whole vectors, and pairs of dims stay together.
MULTIPLE = 4

# The children of an attention that does no more than its products and softmax.
PROJECTIONS = {"qkv", "q", "k", "v", "proj"}


class HeadGroup(NamedTuple):
    """Kept heads that run as one batched product, with dq q/k dims and dv v dims each."""

    heads: tuple[int, ...]
    dq: int
    dv: int

    @property
    def flat(self) -> bool:
        """Whether it is one head that runs as it is projected, [B, N, dims]; equal dims have another call."""
        return len(self.heads) == 1 and 0 < self.dq != self.dv


def heads_in_groups(record, form: str, head_dim: int) -> list[tuple[HeadGroup, list[tuple]]]:
    """The kept heads of a structure's entry, group by group, with (head, q/k dims, v dims) of each.

    Padded, all are one group, as large as the longest of their lists; without any q/k dim dq stays 0.
    """
    heads = list(zip(record.heads, record.qk_dims, record.v_dims, strict=True))
    members: dict[tuple[int, int], list[tuple]] = {}
    longest = max((len(dims) for _, *both in heads for dims in both), default=0)
    longest = min(-(-longest // MULTIPLE) * MULTIPLE, head_dim)
    padded = (longest if any(qk for _, qk, _ in heads) else 0, longest)
    for head, qk, v in heads:
        members.setdefault((len(qk), len(v)) if form == "grouped" else padded, []).append((head, qk, v))
    return [(HeadGroup(tuple(m[0] for m in found), *key), found) for key, found in members.items()]


class CompactAttention(nn.Module):
    """Attention over kept rows and columns only.

    Where q, k and v have one weight and one bias, their kept rows lie group by group in `qkv`: its q, its k,
    its v; else group by group in `q`, `k` and `v`. In the padded form there is one group; rows and columns of
    padding are zero, and so are their gradients. A kind of attention with positions overrides what they do.
    """

    def __init__(self, dense: nn.Module, record, form: str = "grouped"):
        super().__init__()
        self.num_heads, self.scale = dense.num_heads, dense.scale
        groups = heads_in_groups(record, form, dense.head_dim)
        self.groups = tuple(group for group, _ in groups)
        rows = [([], [], []) for _ in groups]
        # Dims that go in pairs lie side by side.
        pairs = dense.pairs()
        place = None if pairs is None else {dim: i for i, dim in enumerate(pairs.flatten().tolist())}
        self.turned: list[list[list[int]]] = []
        for found, (group, members) in zip(rows, groups, strict=True):
            if place is not None:
                members = [(head, tuple(sorted(qk, key=place.get)), v) for head, qk, v in members]
                # Zeros turn to zeros, whichever dim they stand for.
                self.turned.append([[*qk, *[0] * (group.dq - len(qk))] for _, qk, _ in members])
            for head, qk, v in members:
                for part, kept, size in zip(found, (qk, qk, v), (group.dq, group.dq, group.dv), strict=True):
                    part += [head * dense.head_dim + d for d in kept] + [PADDING] * (size - len(kept))
        columns = [row for found in rows for row in found[2]]
        self._keep_sources(dense, rows)
        # A norm of the output has weights of its own for every dim, head after head. It ties all v dims, so
        # that none of them is padding.
        natural = type(getattr(dense, "norm", None)) not in (type(None), nn.Identity)
        self._order = sorted(range(len(columns)), key=columns.__getitem__) if natural else None
        columns = sorted(columns) if natural else columns
        self.proj = smaller(dense.proj, columns=columns)
        take_parts(self, dense, "q_norm", "k_norm", "norm", "attn_drop", "proj_drop")
        gate = getattr(dense, "gate", None)
        self.gate = None if gate is None else smaller(gate, rows=columns)
        # Whether scores are those of q and k as they are projected, without positions.
        steps = ("positioned", "bias", "relative", "scored")
        own = all(getattr(type(self), step) is getattr(CompactAttention, step) for step in steps)
        self._plain = own and bool(groups) and not {"q_norm", "k_norm"} & self._modules.keys()
        bare = self._plain and self._modules.keys() <= PROJECTIONS
        self._children = len(self._modules) if bare else None
        # Columns of q, k and v of each group, one behind the other; which groups are `flat`.
        self._sizes = [len(g.heads) * d for g in self.groups for d in (g.dq, g.dq, g.dv)]
        self._flat = [group.flat for group in self.groups]
        # Heads and dims of each where q, k and v of all are thirds of one product.
        thirds = "qkv" in self._modules and [g.dq == g.dv for g in self.groups] == [True]
        self._thirds = (len(self.groups[0].heads), self.groups[0].dv) if thirds else None

    def _keep_sources(self, dense: nn.Module, kept: list[tuple[list[int], ...]]) -> None:
        """The rows of q, k and v that these groups of heads keep."""
        if type(getattr(dense, "qkv", None)) is nn.Linear and getattr(dense, "q_bias", None) is None:
            kept = [after(i * dense.dims, part) for found in kept for i, part in enumerate(found)]
            self.qkv = smaller(dense.qkv, rows=[row for part in kept for row in part])
            return
        for i, (name, source) in enumerate(zip("qkv", dense.sources(), strict=True)):
            rows = [row for found in kept for row in found[i]]
            weight = select(source.weight, 0, after(source.row, rows))
            bias = source.bias
            bias = None if bias is None else select(bias, 0, after(source.bias_row, rows))
            self.add_module(name, linear_of(weight, bias))

    def positioned(
        self, q: Tensor, k: Tensor, heads: tuple[int, ...], dims: Tensor | None, **positions
    ) -> tuple[Tensor, Tensor]:
        """q and k of these heads [B, h, N, dq] as they are multiplied; dims [h, dq] where these matter."""
        return through_part(self, "q_norm", q), through_part(self, "k_norm", k)

    def answered(self, x: Tensor) -> Tensor:
        """As many tokens of x [B, N, D] as the attention gives."""
        return x

    def bias(self, heads: list[int], **positions) -> Tensor | None:
        """What positions add to the scores of these heads, [..., h, N, N]; None: nothing."""
        return None

    def relative(self, q: Tensor, **positions) -> Tensor | None:
        """What positions add to the scores of queries [B, h, N, dq], read off these; None: nothing."""
        return None

    def _projected(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """q, k and v of each group, [B, N, h * dims]."""
        if (qkv := self._modules.get("qkv")) is not None:
            parts = torch.split_with_sizes(product(qkv, x), self._sizes, -1)
            return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
        parts = [product(self._modules[n], x).split(self._sizes[i::3], -1) for i, n in enumerate("qkv")]
        return list(zip(*parts, strict=True))

    def _heads(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """q, k and v of each group, [B, h, N, dims]."""
        if (thirds := self._thirds) is not None:
            # As few calls as in timm's layer.
            qkv = product(self._modules["qkv"], x).reshape(*x.shape[:2], 3, *thirds)
            return [qkv.permute(2, 0, 3, 1, 4).unbind(0)]
        return [in_heads(*found) for found in zip(self.groups, self._projected(x), strict=True)]

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks and positions as in timm, over the heads of the dense layer."""
        if self._plain and attn_mask is None and not is_causal and not positions:
            return self._left(x, self._plain_outputs(x))
        return self.scored(x, None, attn_mask, is_causal, **positions)[0]

    def adds(self) -> bool:
        """Whether calling it is products and softmax alone, so that the last may add to something else."""
        return len(self._modules) == self._children and runs_as_it_is(self)

    def onto(self, total: Tensor, x: Tensor, gamma: Tensor | None, tokens: int | None = None) -> Tensor:
        """total + gamma times what it makes of x, where it `adds`; in ONNX both may be [B * N, D]."""
        outputs = self._plain_outputs(x) if tokens is None else self._alone(x, tokens)
        return product_onto(total, self._modules["proj"], joined(outputs), gamma)

    def scored(
        self,
        x: Tensor,
        slimming: Slimming | None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **positions,
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and the tokens' scores as in `Heads.token_scores`; None without `slimming`."""
        if not self.groups:
            self.bias([], **positions)  # what stays whatever is removed is computed, as the cost counts it
            return through_part(self, "proj_drop", without_inputs(self.proj, self.answered(x))), None
        dropout = drop_rate(self._modules.get("attn_drop"))
        outputs, scores = [], None
        widths = [len(group.heads) for group in self.groups]
        bias = self.bias([head for group in self.groups for head in group.heads], **positions)
        biases = [None] * len(widths) if bias is None else bias.split(widths, dim=-3)
        for i, (group, (q, k, v), bias) in enumerate(zip(self.groups, self._heads(x), biases, strict=True)):
            dims = torch.tensor(self.turned[i], device=x.device) if self.turned and group.dq else None
            q, k = self.positioned(q, k, group.heads, dims, **positions)
            if slimming is not None and group.dq:
                reader = self.scale * slimming.reader(q.detach())
                row = row_scores((reader @ k.detach().transpose(-2, -1)).squeeze(2))
                scores = row if scores is None else scores + row
            mask = heads_of_mask(attn_mask, list(group.heads), self.num_heads)
            mask = added(mask, self.relative(q, **positions))
            out = attend(q, k, v, self.scale, added(mask, bias), is_causal, dropout)
            outputs.append(out.transpose(1, 2).flatten(2))
        return self._left(x, outputs), scores

    def _plain_outputs(self, x: Tensor) -> list[Tensor]:
        """What each group gives, [B, N, h * dv], where nothing but q, k and v matters.

        A head alone in its group keeps its shape. At batch 1 a small model's latency is made of calls.
        """
        if writes_onnx():
            return self._alone(x)
        dropout = drop_rate(self._modules.get("attn_drop"))
        if self._thirds is not None:
            q, k, v = self._heads(x)[0]
            return [attend(q, k, v, self.scale, None, False, dropout).transpose(1, 2).flatten(2)]
        outputs, parts = [], self._projected(x)
        zero = parts[0][0].new_zeros(1, 1, 1) if any(self._flat) else None
        for group, flat, (q, k, v) in zip(self.groups, self._flat, parts, strict=True):
            if flat:
                outputs.append(weighed(scaled_scores(q, k, self.scale, zero), v, dropout))
            else:
                outputs.append(self._together(group, (q, k, v), dropout))
        return outputs

    def _together(self, group: HeadGroup, parts: tuple[Tensor, ...], dropout: float) -> Tensor:
        """What the heads of a group give, [B, N, h * dv], in one product of q, k and v [B, N, h * dims]."""
        q, k, v = in_heads(group, parts)
        return attend(q, k, v, self.scale, None, False, dropout).transpose(1, 2).flatten(2)

    def _alone(self, x: Tensor, tokens: int | None = None) -> list[Tensor]:
        """What each head gives, [B, N, dv], of an ONNX program, where one product of several heads turns q, k
        and v around first, which takes longer. Without q/k dims the heads of a group stay together.
        """
        counts = [len(group.heads) if group.dq else 1 for group in self.groups for _ in "qkv"]
        sizes = [[size // count] * count for size, count in zip(self._sizes, counts, strict=True)]

        def split(name: str, sizes: list[list[int]]) -> Iterator[Tensor]:
            found = product(self._modules[name], x)
            found = found if tokens is None else found.unflatten(0, (-1, tokens))
            return iter(found.split([*chain(*sizes)], -1))

        whole = "qkv" in self._modules  # all is split off in one op, by the order of its rows
        found = [split("qkv", sizes)] * 3 if whole else [split(n, sizes[i::3]) for i, n in enumerate("qkv")]
        parts = [[next(found[i % 3]) for _ in part] for i, part in enumerate(sizes)]
        dropout, outputs = drop_rate(self._modules.get("attn_drop")), []
        for group, *heads in zip(self.groups, parts[::3], parts[1::3], parts[2::3], strict=True):
            for q, k, v in zip(*heads, strict=True):
                if group.dq:
                    outputs.append(weighed(scaled_scores(q, k, self.scale, x.new_zeros(1, 1, 1)), v, dropout))
                else:
                    outputs.append(self._together(group, (q, k, v), dropout))
        return outputs

    def _left(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the attention makes of its input x and of what each group gives."""
        return through_part(self, "proj_drop", product(self._modules["proj"], self._read(x, outputs)))

    def _read(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the last layer reads."""
        out = joined(outputs)
        out = through_part(self, "norm", out if self._order is None else out[..., self._order])
        if self.gate is not None:
            out = out * product(self.gate, x).sigmoid()
        return out


def joined(outputs: list[Tensor]) -> Tensor:
    """What groups give, side by side."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool, dropout: float
) -> Tensor:
    """softmax(scale q k^T + mask) v for q [B, h, N, dq], k [B, h, M, dq], v [B, h, M, dv].

    Scores are 0 when dq is 0.
    """
    if q.size(-1) == v.size(-1):
        if on_gpu := q.is_cuda:
            q, k, v = (in_whole_vectors(t) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
        if on_gpu and out.requires_grad:
            out.register_hook(in_whole_vectors)  # it is a part of the gradient of all groups' outputs
        return out
    (B, h, N, dq), M = q.shape, k.shape[2]
    v = v.reshape(B * h, M, v.shape[3])
    if dq:
        scores = scaled_scores(q.reshape(B * h, N, dq), k.reshape(B * h, M, dq), scale, q.new_zeros(1, 1, 1))
    else:
        scores = v.new_zeros(B * h, N, M)
    if is_causal or mask is not None:
        scores = masked(scores.view(B, h, N, M), mask, is_causal).view(B * h, N, M)
    return weighed(scores, v, dropout).view(B, h, N, v.shape[-1])


def in_whole_vectors(t: Tensor) -> Tensor:
    """t [.., d] or a copy of it: every row of whole vectors begins at one.

    A group's rows begin where those of the group before end. Fused attention on a GPU reads 16 bytes at a
    time where d is a multiple of them, and does not ask where a row begins: that faults.
    """
    vector = 16 // t.element_size()
    begins = (t.storage_offset(), *t.stride()[:-1])
    return t if t.shape[-1] % vector or not any(n % vector for n in begins) else t.contiguous()


def in_heads(group: HeadGroup, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v [B, N, h * dims] of a group as [B, h, N, dims]."""
    B, N, _ = parts[2].shape
    heads, found = len(group.heads), []
    for part, dims in zip(parts, (group.dq, group.dq, group.dv), strict=True):
        # A view of no dims is nothing that ONNX could express.
        new = part.reshape(B, N, heads, dims).transpose(1, 2) if dims else part.new_zeros(B, heads, N, 0)
        found.append(new)
    return tuple(found)


def scaled_scores(q: Tensor, k: Tensor, scale: float, zero: Tensor) -> Tensor:
    """scale q k^T for q [G, N, dq] and k [G, M, dq]; zero [1, 1, 1] is not read."""
    # One call: scaling by another would take as long as the product.
    return torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=scale)


def weighed(scores: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(scores) v for scores [G, N, M] and v [G, M, dv]."""
    weights = scores.softmax(dim=-1)
    return torch.bmm(F.dropout(weights, dropout) if dropout else weights, v)


def heads_of_mask(attn_mask: Tensor | None, heads: list[int], num_heads: int) -> Tensor | None:
    """The part of an attention mask [..., H or 1, N, N] that concerns the kept heads."""
    if attn_mask is None or attn_mask.dim() < 3 or attn_mask.shape[-3] != num_heads or num_heads == 1:
        return attn_mask
    return attn_mask[..., heads, :, :]


def added(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask that is bool (True stays) or added, and a bias that is added, as one; None: neither."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores [B, H, N, N] under a bool mask (True stays), one that is added, or the causal one."""
    if is_causal:
        N = scores.shape[-1]
        future = torch.ones(N, N, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf"))
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask

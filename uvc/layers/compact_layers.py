"""Attention and MLPs after compaction: plain torch on small weights.

B batch, N tokens, D width; h heads of a group, dq and dv the q/k and v dims of each.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.layers.children import drop_rate, is_plain, is_untouched, product, writes_onnx
from uvc.layers.columns import Columns, columns_of
from uvc.layers.token_pruning import Slimming, row_scores

# How what is kept runs: a product for each group of equal heads; or one for all of them, with zeros up to one
# size, and neurons with zeros up to a multiple.
FORMS = ("grouped", "padded")
PADDING = -1  # in the place of a row: zeros
# Of dims that heads are padded to: rows of whole vectors, and pairs of dims stay together.
MULTIPLE = 4
# Of neurons: at 197 tokens both products of 374 took 4% longer than those of 376.
NEURONS = 8


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
        # Columns of q, k and v of each group, one behind the other; which groups are `flat`.
        self._sizes = [len(g.heads) * d for g in self.groups for d in (g.dq, g.dq, g.dv)]
        self._flat = [group.flat for group in self.groups]

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
        parts = [getattr(self, name)(x).split(self._sizes[i::3], -1) for i, name in enumerate("qkv")]
        return list(zip(*parts, strict=True))

    def _heads(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """q, k and v of each group, [B, h, N, dims]."""
        B, N, _ = x.shape
        first = self.groups[0]
        if len(self.groups) == 1 and first.dq == first.dv and "qkv" in self._modules:
            # As few calls as in timm's layer.
            qkv = product(self._modules["qkv"], x).reshape(B, N, 3, len(first.heads), first.dv)
            return [qkv.permute(2, 0, 3, 1, 4).unbind(0)]
        return [in_heads(*found) for found in zip(self.groups, self._projected(x), strict=True)]

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks and positions as in timm, over the heads of the dense layer."""
        if self._plain and attn_mask is None and not is_causal and not positions:
            return self._left(x, self._plain_outputs(x))
        return self.scored(x, None, attn_mask, is_causal, **positions)[0]

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
        dropout = drop_rate(self._modules.get("attn_drop"))
        # There one product of several heads turns q, k and v around first, which takes longer.
        apart = writes_onnx()
        if self._flat == [False] and not apart:
            q, k, v = self._heads(x)[0]
            return [attend(q, k, v, self.scale, None, False, dropout).transpose(1, 2).flatten(2)]
        outputs, parts = [], self._projected(x)
        zero = parts[0][0].new_zeros(1, 1, 1)
        for group, flat, (q, k, v) in zip(self.groups, self._flat, parts, strict=True):
            if flat:
                outputs.append(weighed(scaled_scores(q, k, self.scale, zero), v, dropout))
            elif apart and group.dq:
                for each in zip(*(part.chunk(len(group.heads), -1) for part in (q, k, v)), strict=True):
                    scores = scaled_scores(*each[:2], self.scale, zero)
                    outputs.append(weighed(scores, each[2], dropout))
            else:
                q, k, v = in_heads(group, (q, k, v))
                outputs.append(attend(q, k, v, self.scale, None, False, dropout).transpose(1, 2).flatten(2))
        return outputs

    def _left(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the attention makes of its input x and of what each group gives."""
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        out = through_part(self, "norm", out if self._order is None else out[..., self._order])
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return through_part(self, "proj_drop", product(self._modules["proj"], out))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool, dropout: float
) -> Tensor:
    """softmax(scale q k^T + mask) v for q [B, h, N, dq], k [B, h, M, dq], v [B, h, M, dv].

    Scores are 0 when dq is 0.
    """
    if q.shape[-1] == v.shape[-1]:
        on_gpu = q.device.type == "cuda"
        if on_gpu:
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


class CompactMlp(nn.Module):
    """The two linear layers over the kept neurons only; in the padded form some more, which are zero."""

    # Whether the kept neurons are multiplied by gates, so that a neuron of zeros gives zero.
    GATED = False

    def __init__(self, dense: nn.Module, neurons: tuple[int, ...], form: str = "grouped"):
        super().__init__()
        rows = list(neurons)
        if form == "padded" and (self.GATED or gives_zero(dense.act)):
            size = min(-(-len(rows) // NEURONS) * NEURONS, dense.fc2.in_features)
            rows += [PADDING] * (size - len(rows))
        self._keep_rows(dense, rows)
        self.act = copy.deepcopy(dense.act)
        take_parts(self, dense, "drop1", *(["norm"] if dense.NORM_INSIDE else []))
        self.fc2 = smaller(dense.fc2, columns=rows)
        take_parts(self, dense, "drop2")

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.fc1 = smaller(dense.fc1, rows=neurons)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        return self._modules["act"](product(self._modules["fc1"], x))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        fc2 = self._modules["fc2"]
        if fc2.in_features == 0:
            return through_part(self, "drop2", without_inputs(fc2, x))
        hidden = through_part(self, "norm", through_part(self, "drop1", self.hidden(x)))
        return through_part(self, "drop2", product(fc2, hidden))


class CompactGluMlp(CompactMlp):
    """A gated MLP whose fc1 holds value and gate, one behind the other."""

    GATED = True

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.gate_last = dense.gate_last
        self.fc1 = smaller(dense.fc1, rows=neurons + after(dense.fc2.in_features, neurons))

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        a, b = self.fc1(x).chunk(2, dim=-1)
        return a * self.act(b) if self.gate_last else self.act(a) * b


class CompactSwiGLU(CompactMlp):
    """A gated MLP of two first layers, fc1_g the gate and fc1_x the value."""

    GATED = True

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.fc1_g, self.fc1_x = smaller(dense.fc1_g, rows=neurons), smaller(dense.fc1_x, rows=neurons)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        return self.act(self.fc1_g(x)) * self.fc1_x(x)


def gives_zero(act: nn.Module) -> bool:
    """Whether an activation without weights is zero at zero, so that columns behind it get no gradient."""
    zero = torch.zeros(1, device="cpu")
    with torch.no_grad():
        return not any(True for _ in act.parameters()) and bool(act(zero) == 0)


def passes_on(module: nn.Module) -> bool:
    """Whether a module gives what it gets, in training too, and nobody watches it do so."""
    drops_nothing = type(module) is nn.Dropout and module.p == 0.0
    return (type(module) is nn.Identity or drops_nothing) and is_untouched(module)


def take_parts(new: nn.Module, dense: nn.Module, *names: str) -> None:
    """Copies of the children of `dense` that do something: calling one takes as long as a small product."""
    for name in names:
        if (part := dense._modules.get(name)) is not None and not passes_on(part):
            new.add_module(name, copy.deepcopy(part))


def through_part(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """x through the child of this name, where there is one."""
    part = layer._modules.get(name)
    return x if part is None else part(x)


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


def after(start: int, rows: list[int]) -> list[int]:
    """Rows counted from `start` on."""
    return [row if row == PADDING else start + row for row in rows]


def select(tensor: Tensor, dim: int, index: list[int]) -> Tensor:
    """A copy of the given rows or columns, zeros for padding, detached; frozen if `tensor` is."""
    index = torch.tensor(index, dtype=torch.int64, device=tensor.device)
    kept = tensor.detach().index_select(dim, index.clamp_min(0))
    kept.movedim(dim, 0)[index == PADDING] = 0
    return nn.Parameter(kept, requires_grad=tensor.requires_grad)


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of this weight and bias."""
    # Made with one feature on meta and filled after, as torch's initialisation warns about zero features.
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def smaller(
    dense: nn.Linear | Columns, rows: list[int] | None = None, columns: list[int] | None = None
) -> nn.Linear:
    """A copy of the given rows, or columns, of `dense`; without columns the bias stays."""
    if rows is not None:
        bias = None if dense.bias is None else select(dense.bias, 0, rows)
        return linear_of(select(dense.weight, 0, rows), bias)
    bias = dense.bias
    bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    weight, first = columns_of(dense)
    return linear_of(select(weight, 1, after(first, columns)), bias)


def without_inputs(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer without inputs adds to every token of x [B, N, D]."""
    if not is_plain(linear):
        return linear(x.new_zeros(*x.shape[:-1], 0))
    # The bias alone, as exported programs do not take matrices without columns.
    out = x.new_zeros(*x.shape[:-1], linear.out_features)
    return out if linear.bias is None else out + linear.bias

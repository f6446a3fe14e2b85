"""Attention over kept heads on Triton: packed weights and vendor GEMMs around `attention_core.py`.

B images, N tokens, D width, A = heads * head dim, M = B*N; h kept heads. `qkv` [M, S] holds the kept q, then
k, then v dims, `heads` [M, V] the outputs of the heads; each head's dims are padded with zeros to a multiple
of 8, so that vendor GEMMs are aligned and every head starts at a vector load.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from ..attention import KeptHeads
from . import attention_core as core
from .launch import ALIGN, align, inverse_of, multiply, planned, provide, register, to_device
from .packing import gather

X, QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, PROJ_BIAS = (1 << i for i in range(5))


class _Plan(NamedTuple):
    """Where everything lies for one structure; int32 tensors on the device.

    rows [S]: row of qkv_weight per packed row; columns [V]: column of proj_weight per packed column; -1 is
    padding. whole_rows [3A], whole_columns [A]: the other way round, -1 is removed. table [h, 6] and counts:
    see `core.attention_core`.
    """

    rows: Tensor
    columns: Tensor
    whole_rows: Tensor
    whole_columns: Tensor
    table: Tensor
    counts: list[int]


@planned
def _plan(kept: Sequence[Tensor], A: int) -> _Plan:
    # One wait for the device per structure; everything goes back in one copy.
    qk, qk_cut, v, v_cut = (t.tolist() for t in kept)
    heads = range(len(v_cut) - 1)
    if len(qk_cut) != len(v_cut) or [qk_cut[-1], v_cut[-1]] != [len(qk), len(v)]:
        raise ValueError(
            "attention: kept.qk_offsets and kept.v_offsets must cut kept.qk and kept.v head by head"
        )
    if any(not 0 <= i < A for i in qk + v):
        raise ValueError(f"attention: kept.qk and kept.v must be positions in 0..{A - 1}")
    rows: list[int] = []
    starts = []
    for first, kept_dims, cut in ((0, qk, qk_cut), (A, qk, qk_cut), (2 * A, v, v_cut)):
        starts.append([])
        for h in heads:
            starts[-1].append(len(rows))
            dims = kept_dims[cut[h] : cut[h + 1]]
            rows += [first + i for i in dims] + [-1] * (align(len(dims)) - len(dims))
    packed_v = starts[2][0] if heads else 0
    columns = [i - 2 * A if i >= 0 else -1 for i in rows[packed_v:]]
    widths = [[align(cut[h + 1] - cut[h]) for h in heads] for cut in (qk_cut, v_cut)]
    table = [
        (starts[0][h], starts[1][h], starts[2][h], starts[2][h] - packed_v, widths[0][h], widths[1][h])
        for h in heads
    ]
    table.sort(key=lambda fields: max(fields[4:]))
    widest = [max(fields[4:]) for fields in table]
    if max(widest, default=0) > core.WIDTHS[-1]:
        raise ValueError(
            f"attention: a head of more than {core.WIDTHS[-1]} dims needs another backend than triton"
        )
    lists = [
        rows,
        columns,
        inverse_of(rows, 3 * A),
        inverse_of(columns, A),
        [i for row in table for i in row],
    ]
    flat = to_device([i for values in lists for i in values], kept[0].device)
    *indices, table = flat.split([len(values) for values in lists])
    wanted = [next(w for w in core.WIDTHS if w >= width) for width in widest]
    return _Plan(*indices, table.view(-1, 6), [wanted.count(w) for w in core.WIDTHS])


def _room(dims: int, heads: int) -> int:
    """Columns that hold `dims` dims of so many heads however they are padded: fake tensors know no more."""
    return (dims + (ALIGN - 1) * heads) // ALIGN * ALIGN


def _columns(matrix: Tensor, used: int) -> Tensor:
    """The columns in use; the others are zeroed, so that outputs of the op are the same at every call."""
    if used < matrix.shape[1]:
        matrix[:, used:].zero_()
    return matrix[:, :used]


def _sizes(x: Tensor, kept: KeptHeads) -> tuple[int, int, int, int]:
    """h, M, and the columns to allocate for `qkv` and `heads`."""
    h = kept.v_offsets.shape[0] - 1
    qk, v = _room(kept.qk.shape[0], h), _room(kept.v.shape[0], h)
    return h, x.shape[0] * x.shape[1], 2 * qk + v, v


def _attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, qk, qk_offsets, v, v_offsets, scale):
    if any(t is not None and t.dtype != x.dtype for t in (qkv_weight, qkv_bias, proj_weight, proj_bias)):
        raise ValueError("attention: x and the weights must have one dtype")
    kept = KeptHeads(qk, qk_offsets, v, v_offsets)
    plan = _plan(kept, proj_weight.shape[1])
    weight, bias, proj = _packed(qkv_weight, qkv_bias, proj_weight, plan)
    h, M, S, V = _sizes(x, kept)
    qkv, heads = x.new_empty(M, S), x.new_empty(M, V)
    top = x.new_empty(h, M, dtype=_dispatch.statistics_dtype(x.dtype))
    inverse = torch.empty_like(top)
    multiply(_columns(qkv, weight.shape[0]), x.reshape(M, x.shape[2]), weight.t(), bias)
    core.attention_core(qkv, plan.table, plan.counts, x.shape[1], scale, heads, top, inverse)
    out = x.new_empty(*x.shape[:2], proj.shape[0])
    multiply(out.view(M, proj.shape[0]), _columns(heads, proj.shape[1]), proj.t(), proj_bias)
    return out, qkv, heads, top, inverse


def _packed(qkv_weight, qkv_bias, proj_weight, plan):
    bias = None if qkv_bias is None else qkv_bias.contiguous()
    return gather(qkv_weight.contiguous(), bias, proj_weight.contiguous(), plan.rows, plan.columns)


def _attention_backward(
    grad,
    x,
    qkv_weight,
    qkv_bias,
    proj_weight,
    qk,
    qk_offsets,
    v,
    v_offsets,
    scale,
    qkv,
    heads,
    top,
    inverse,
    needs,
):
    plan = _plan((qk, qk_offsets, v, v_offsets), proj_weight.shape[1])
    weight, _, proj = _packed(qkv_weight, None, proj_weight, plan)
    M = x.shape[0] * x.shape[1]
    S, V = weight.shape[0], proj.shape[1]
    grad, rows = grad.reshape(M, proj.shape[0]), x.reshape(M, x.shape[2])
    grad_x = grad_weight = grad_bias = grad_proj = grad_proj_bias = None
    if needs & PROJ_BIAS:
        grad_proj_bias = grad.sum(0)
    if needs & PROJ_WEIGHT:
        grad_proj = grad.t() @ heads[:, :V]
    if needs & (X | QKV_WEIGHT | QKV_BIAS):
        grad_heads, grad_qkv = torch.empty_like(heads), torch.empty_like(qkv)
        torch.mm(grad, proj, out=grad_heads[:, :V])
        core.attention_core_backward(
            qkv, heads, grad_heads, top, inverse, plan.table, plan.counts, x.shape[1], scale, grad_qkv
        )
        grad_qkv = grad_qkv[:, :S]
        grad_x = (grad_qkv @ weight).view(x.shape) if needs & X else None
        grad_weight = grad_qkv.t() @ rows if needs & QKV_WEIGHT else None
        grad_bias = grad_qkv.sum(0) if needs & QKV_BIAS else None
    grad_weight, grad_bias, grad_proj = gather(
        grad_weight, grad_bias, grad_proj, plan.whole_rows, plan.whole_columns
    )
    grads = (grad_x, grad_weight, grad_bias, grad_proj, grad_proj_bias)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _fake(x, qkv_weight, qkv_bias, proj_weight, proj_bias, qk, qk_offsets, v, v_offsets, scale):
    h, M, S, V = _sizes(x, KeptHeads(qk, qk_offsets, v, v_offsets))
    top, inverse = (x.new_empty(h, M, dtype=_dispatch.statistics_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(*x.shape[:2], proj_weight.shape[0]), x.new_empty(M, S), x.new_empty(M, V), top, inverse


def _fake_backward(grad, x, qkv_weight, qkv_bias, proj_weight, *rest):
    A = proj_weight.shape[1]
    shapes = (x.shape, qkv_weight.shape, (3 * A,), proj_weight.shape, (proj_weight.shape[0],))
    return _dispatch.empty_gradients(x, shapes, rest[-1])


def _setup_context(ctx, inputs, output):
    x, qkv_weight, qkv_bias, proj_weight, _, *kept, ctx.scale = inputs
    ctx.save_for_backward(x, qkv_weight, qkv_bias, proj_weight, *kept, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    x, qkv_weight, qkv_bias, proj_weight, *kept, qkv, heads, top, inverse = ctx.saved_tensors
    _dispatch.forbid_double_backward("attention")
    needs = _dispatch.need_bits(ctx.needs_input_grad[:5])
    grads = torch.ops.uvc_kernels.attention_triton_backward(
        grad, x, qkv_weight, qkv_bias, proj_weight, *kept, ctx.scale, qkv, heads, top, inverse, needs
    )
    return *_dispatch.asked_for(grads, needs), None, None, None, None, None


_KEPT = "Tensor qk, Tensor qk_offsets, Tensor v, Tensor v_offsets, float scale"


def _run(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
) -> Tensor:
    return torch.ops.uvc_kernels.attention_triton(
        x, qkv_weight, qkv_bias, proj_weight, proj_bias, *kept, scale
    )[0]


register(
    "attention_triton",
    f"(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, {_KEPT}) "
    "-> (Tensor out, Tensor qkv, Tensor heads, Tensor top, Tensor inverse)",
    _attention,
    _fake,
    (_backward, _setup_context),
)
register(
    "attention_triton_backward",
    f"(Tensor grad, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, {_KEPT}, Tensor qkv, "
    "Tensor heads, Tensor top, Tensor inverse, int needs) "
    "-> (Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias)",
    _attention_backward,
    _fake_backward,
)
provide("attention", _run)

"""The attention of `..fused` on Triton: kept rows of the qkv matrix read in place, output matrix transposed.

    qkv = x W[rows]^T + b[rows],   heads = core(qkv),   out = heads T[columns] + bproj,   T = Wproj^T

T is made in kept rows only, once per step. M tokens; all H heads have a program of the core, and those of
removed heads, whose widths in the table are zero, leave at once.
"""

import torch
from torch import Tensor

from .. import _autograd, _dispatch, _dtypes
from ..fused import EnvelopeHeads
from ..indices import WIDTHS
from ..packed.pieces import bias_gradient
from .attention_core import attention_core, attention_core_backward
from .fused_matmul import back, grads, onto, transpose
from .launch import DTYPES, INTERPRETED, register

X, WEIGHT, BIAS, PROJ, PROJ_BIAS = (1 << i for i in range(5))


def _counts(columns: Tensor, table: Tensor) -> list[int]:
    # All heads are as wide as a dense one.
    H = table.shape[0]
    width = next(width for width in WIDTHS if width * H >= columns.shape[0])
    return [H if width == each else 0 for each in WIDTHS]


def _attention(
    x, weight, bias, proj, proj_bias, S, V, rows, columns, whole_rows, whole_columns, table, scale
):
    given_ = (x, weight, bias, proj, proj_bias, S, V, rows, columns, whole_rows, whole_columns, table, scale)
    out, transposed, qkv, heads, top, inverse = _fake(*given_)
    onto("plain", x.reshape(-1, x.shape[2]).contiguous(), weight.contiguous(), bias, rows, S, qkv)
    if heads.numel():
        attention_core(qkv, table, _counts(columns, table), x.shape[1], scale, heads, top, inverse)
    transpose(proj.contiguous(), whole_columns, transposed)
    back([(heads, transposed)], proj_bias, columns, V, out.view(-1, proj.shape[0]))
    return out, transposed, qkv, heads, top, inverse


def _attention_backward(
    grad, x, weight, bias, proj, proj_bias, S, V, rows, columns, whole_rows, whole_columns, table, scale,
    transposed, qkv, heads, top, inverse, needs,
):  # fmt: skip
    results = list(_autograd.empty_gradients((x, weight, bias, proj, proj_bias), needs))
    grad_x, grad_weight, grad_bias, grad_proj, _ = _autograd.asked_for(results, needs)
    tokens = x.shape[1]
    grad, x = grad.reshape(-1, proj.shape[0]).contiguous(), x.reshape(-1, x.shape[2]).contiguous()
    if needs & (X | WEIGHT | BIAS):
        grad_heads, grad_qkv = torch.empty_like(heads), torch.empty_like(qkv)
        onto("plain", grad, transposed, None, columns, V, grad_heads)
        if heads.numel():
            attention_core_backward(
                qkv, heads, grad_heads, top, inverse, table, _counts(columns, table), tokens, scale, grad_qkv
            )
        if grad_x is not None:
            back([(grad_qkv, weight.contiguous())], None, rows, S, grad_x.view(x.shape))
        grads(grad_qkv, x, rows, S, whole_rows, grad_weight, grad_bias)
    grads(heads, grad, columns, V, whole_columns, grad_proj, columns=True)
    if needs & PROJ_BIAS:
        results[4] = bias_gradient(grad, proj_bias)
    return tuple(results)


def _fake(x, weight, bias, proj, proj_bias, S, V, rows, columns, whole_rows, whole_columns, table, scale):
    M, H = x.shape[0] * x.shape[1], table.shape[0]
    top, inverse = (x.new_empty(H, M, dtype=_dtypes.statistics_dtype(x.dtype)) for _ in range(2))
    out, transposed = x.new_empty(*x.shape[:2], proj.shape[0]), proj.new_empty(proj.shape[1], proj.shape[0])
    return out, transposed, x.new_empty(M, rows.shape[0]), x.new_empty(M, columns.shape[0]), top, inverse


def _fake_backward(grad, *rest):
    return _autograd.empty_gradients(rest[:5], rest[-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx, grad, *_):
    _autograd.forbid_double_backward("attention_fused")
    needs = _autograd.need_bits(ctx.needs_input_grad[:5])
    tensors, saved = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
    results = torch.ops.uvc_kernels.attention_fused_backward(grad, *tensors, ctx.scale, *saved, needs)
    return *_autograd.asked_for(results, needs), *[None] * 8


_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor proj, Tensor? proj_bias, Tensor S, Tensor V, Tensor rows, "
    "Tensor columns, Tensor whole_rows, Tensor whole_columns, Tensor table, float scale"
)
_SAVED = "Tensor transposed, Tensor qkv, Tensor heads, Tensor top, Tensor inverse"
register(
    "attention_fused",
    f"({_INPUTS}) -> (Tensor out, {_SAVED})",
    _attention,
    _fake,
    (_autograd_backward, _setup_context),
)
register(
    "attention_fused_backward",
    f"(Tensor grad, {_INPUTS}, {_SAVED}, int needs) "
    "-> (Tensor x, Tensor weight, Tensor bias, Tensor proj, Tensor proj_bias)",
    _attention_backward,
    _fake_backward,
)


def _run(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    envelope: EnvelopeHeads,
    scale: float,
) -> Tensor:
    tensors = (x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    return torch.ops.uvc_kernels.attention_fused(*tensors, *envelope[1:], scale)[0]


_dispatch.provide("attention_fused", "triton", _run, "cpu" if INTERPRETED.value else "cuda", DTYPES)

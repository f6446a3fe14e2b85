"""Attention of a provider: pack, qkv product, core, output product.

    qkv = x Wqkv[rows]^T + bqkv[rows],   heads = core(qkv),   out = heads Wproj[:, columns]^T + bproj

B images, N tokens, D width, M = B*N; S packed q, k and v rows, V packed v dims, h kept heads (`..kept`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _autograd, _dtypes
from ..attention import attention_packing
from ..gather import gather
from ..indices import WIDTHS, KeptHeads, counts_of
from .pieces import Pieces, Provider, bias_gradient, declare, given, multiply

X, WEIGHT, BIAS, PROJ, PROJ_BIAS = (1 << i for i in range(5))
_TENSORS = "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias"
_KEPT = (
    "Tensor qk, Tensor v, Tensor table, Tensor marks16, Tensor marks32, Tensor marks64, Tensor marks128, "
    "float scale, bool recompute"
)
_SAVED = "Tensor qkv, Tensor heads, Tensor top, Tensor inverse"
# qk and v, the kept dims without padding, are there for their lengths: for those who count FLOPs.
declare("attend", f"({_TENSORS}, {_KEPT}) -> (Tensor out, {_SAVED})")
declare(
    "attend_backward",
    f"(Tensor grad, {_TENSORS}, {_KEPT}, {_SAVED}, int needs) "
    "-> (Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias)",
)


def _attend(pieces: Pieces, x, weight, bias, proj, proj_bias, qk, v, table, *rest):
    *marks, scale, recompute = rest
    counts = counts_of(marks)
    if sum(counts) != table.shape[0]:
        raise ValueError(
            f"attention: a head of more than {WIDTHS[-1]} dims needs the backend cpu or reference"
        )
    out, _, heads, top, inverse = _fake(x, weight, bias, proj, proj_bias, qk, v, table, *rest)
    M = heads.shape[0]
    qkv = multiply(x.reshape(M, x.shape[2]), weight.t(), bias)
    if heads.numel():
        pieces.attention_core(qkv, table, counts, x.shape[1], scale, heads, top, inverse)
    out = multiply(heads, proj.t(), proj_bias).view(out.shape)
    return out, qkv.new_empty(0) if recompute else qkv, heads, top, inverse


def _attend_backward(pieces: Pieces, grad, x, weight, bias, proj, proj_bias, qk, v, table, *rest):
    *marks, scale, recompute, qkv, heads, top, inverse, needs = rest
    M = heads.shape[0]
    grad, rows = grad.reshape(M, proj.shape[0]), x.reshape(M, x.shape[2])
    grad_x = grad_weight = grad_bias = None
    if needs & (X | WEIGHT | BIAS):
        qkv = multiply(rows, weight.t(), bias) if recompute else qkv
        grad_qkv = torch.empty_like(qkv)
        if heads.numel():
            pieces.attention_core_backward(
                qkv, heads, grad @ proj, top, inverse, table, counts_of(marks), x.shape[1], scale, grad_qkv
            )
        grad_x = (grad_qkv @ weight).view(x.shape) if needs & X else None
        grad_weight = grad_qkv.t() @ rows if needs & WEIGHT else None
        grad_bias = bias_gradient(grad_qkv, bias) if needs & BIAS else None
    grad_proj = grad.t() @ heads if needs & PROJ else None
    grad_proj_bias = bias_gradient(grad, proj_bias) if needs & PROJ_BIAS else None
    return given((grad_x, grad_weight, grad_bias, grad_proj, grad_proj_bias), x)


def _fake(x, weight, bias, proj, proj_bias, qk, v, table, *rest):
    M, h = x.shape[0] * x.shape[1], table.shape[0]
    top, inverse = (x.new_empty(h, M, dtype=_dtypes.statistics_dtype(x.dtype)) for _ in range(2))
    out, heads = x.new_empty(*x.shape[:2], proj.shape[0]), x.new_empty(M, proj.shape[1])
    return out, x.new_empty((0,) if rest[-1] else (M, weight.shape[0])), heads, top, inverse


def _fake_backward(grad, x, weight, bias, proj, proj_bias, *rest):
    return _autograd.empty_gradients((x, weight, bias, proj, proj_bias), rest[-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.recompute = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd makes zeros as large as what is saved.
    ctx.set_materialize_grads(False)


def define(provider: Provider) -> dict[str, Callable]:
    """The ops of this provider."""
    name = provider.define("attend", _attend, _fake)
    provider.define("attend_backward", _attend_backward, _fake_backward)
    attend, attend_backward = provider.op("attend"), provider.op("attend_backward")

    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 14
        _autograd.forbid_double_backward("attention")
        needs = _autograd.need_bits(ctx.needs_input_grad[:5])
        tensors, saved = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
        grads = attend_backward(grad, *tensors, ctx.scale, ctx.recompute, *saved, needs)
        return *_autograd.asked_for(grads, needs), *[None] * 9

    torch.library.register_autograd(name, backward, setup_context=_setup_context)

    def run(
        x: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        kept: KeptHeads,
        scale: float,
        packed: Sequence[Tensor | None] | None,
        recompute: bool,
    ) -> Tensor:
        if packed is None:
            packed = gather(*attention_packing(qkv_weight, qkv_bias, proj_weight, kept), x.dtype)
        return attend(x, *packed, proj_bias, kept.qk, kept.v, kept.table, *kept[-4:], scale, recompute)[0]

    return {"attention": run}

"""The MLP of `..fused` on Triton: kept rows of fc1 in place, activation behind the product, fc2 transposed.

    u = x W1[rows]^T + b1[rows],   a = act(u)   or   act(x Wg[rows]^T + bg[rows]) u,   out = a T[rows] + b2
    da = do T[rows]^T,  du = da act'(u),  dx = du W1[rows],  dW1[rows] = du^T x,  dW2[:, rows] = do^T a

T = W2^T, in kept rows only, made once per step. M tokens, E envelope.
"""

import torch
from torch import Tensor

from .. import _autograd, _dispatch
from ..fused import EnvelopeNeurons
from ..packed.pieces import bias_gradient
from .fused_matmul import back, grads, onto, transpose
from .launch import DTYPES, INTERPRETED, register

X, FC1, BIAS1, FC2, BIAS2, GATE, GATE_BIAS = (1 << i for i in range(7))


def _mlp(x, fc1, bias1, fc2, bias2, gate, gate_bias, count, rows, whole, activation):
    out, transposed, u, g, a = _fake(
        x, fc1, bias1, fc2, bias2, gate, gate_bias, count, rows, whole, activation
    )
    x, fc1 = x.reshape(-1, x.shape[-1]).contiguous(), fc1.contiguous()
    transpose(fc2.contiguous(), whole, transposed)
    if gate is None:
        onto("act", x, fc1, bias1, rows, count, u, activation=activation, a=a)
    else:
        opened = {"gate": gate.contiguous(), "gate_bias": gate_bias, "g": g}
        onto("gated", x, fc1, bias1, rows, count, u, activation=activation, a=a, **opened)
    back([(a, transposed)], bias2, rows, count, out.view(-1, fc2.shape[0]))
    return out, transposed, u, g, a


def _mlp_backward(
    grad,
    x,
    fc1,
    bias1,
    fc2,
    bias2,
    gate,
    gate_bias,
    count,
    rows,
    whole,
    activation,
    transposed,
    u,
    g,
    a,
    needs,
):
    tensors = (x, fc1, bias1, fc2, bias2, gate, gate_bias)
    results = list(_autograd.empty_gradients(tensors, needs))
    grad_x, grad_fc1, grad_bias1, grad_fc2, _, grad_gate, grad_gate_bias = _autograd.asked_for(results, needs)
    grad, x = grad.reshape(-1, fc2.shape[0]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous()
    if needs & (X | FC1 | BIAS1 | GATE | GATE_BIAS):
        grad_u = torch.empty_like(u)
        grad_g = None if gate is None else torch.empty_like(u)
        kind = "act backward" if gate is None else "gated backward"
        into = {"activation": activation, "g": g, "grad_u": grad_u, "grad_g": grad_g}
        onto(kind, grad, transposed, None, rows, count, u, **into)
        pairs = [(grad_u, fc1.contiguous())]
        if gate is not None:
            pairs.append((grad_g, gate.contiguous()))
        if grad_x is not None:
            back(pairs, None, rows, count, grad_x.view(x.shape))
        grads(grad_u, x, rows, count, whole, grad_fc1, grad_bias1)
        if gate is not None:
            grads(grad_g, x, rows, count, whole, grad_gate, grad_gate_bias)
    grads(a, grad, rows, count, whole, grad_fc2, columns=True)
    if needs & BIAS2:
        results[4] = bias_gradient(grad, bias2)
    return tuple(results)


def _fake(x, fc1, bias1, fc2, bias2, gate, gate_bias, count, rows, whole, activation):
    u, a = (x.new_empty(x.shape[:-1].numel(), rows.shape[0]) for _ in range(2))
    g = x.new_empty(0) if gate is None else torch.empty_like(u)
    return x.new_empty(*x.shape[:-1], fc2.shape[0]), fc2.new_empty(fc2.shape[1], fc2.shape[0]), u, g, a


def _fake_backward(grad, *rest):
    return _autograd.empty_gradients(rest[:7], rest[-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx, grad, *_):
    _autograd.forbid_double_backward("mlp_fused")
    needs = _autograd.need_bits(ctx.needs_input_grad[:7])
    tensors, saved = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    results = torch.ops.uvc_kernels.mlp_fused_backward(grad, *tensors, ctx.activation, *saved, needs)
    return *_autograd.asked_for(results, needs), None, None, None, None


_INPUTS = (
    "Tensor x, Tensor fc1, Tensor? bias1, Tensor fc2, Tensor? bias2, Tensor? gate, Tensor? gate_bias, "
    "Tensor count, Tensor rows, Tensor whole, str activation"
)
_SAVED = "Tensor transposed, Tensor u, Tensor g, Tensor a"
_GRADIENTS = "(Tensor x, Tensor fc1, Tensor bias1, Tensor fc2, Tensor bias2, Tensor gate, Tensor gate_bias)"
register(
    "mlp_fused", f"({_INPUTS}) -> (Tensor out, {_SAVED})", _mlp, _fake, (_autograd_backward, _setup_context)
)
register(
    "mlp_fused_backward",
    f"(Tensor grad, {_INPUTS}, {_SAVED}, int needs) -> {_GRADIENTS}",
    _mlp_backward,
    _fake_backward,
)


def _run(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    envelope: EnvelopeNeurons,
    activation: str,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
) -> Tensor:
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias)
    return torch.ops.uvc_kernels.mlp_fused(*tensors, *envelope[1:], activation)[0]


_dispatch.provide("mlp_fused", "triton", _run, "cpu" if INTERPRETED.value else "cuda", DTYPES)

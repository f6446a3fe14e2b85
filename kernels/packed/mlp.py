"""MLP of a provider: pack, product, activation, product.

    u = x W1[rows]^T + b1[rows],   a = act(u)   or, with a gate,   a = act(x Wg[rows]^T + bg[rows]) u
    out = a W2[:, rows]^T + b2;    backward: a again, then du and, with a gate, dg

M tokens, D width; F' packed neurons (`..kept`), whose padding is zero everywhere as act(0) = 0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _autograd
from ..gather import gather
from ..indices import KeptNeurons
from ..mlp import mlp_packing
from .pieces import Pieces, Provider, bias_gradient, declare, given, multiply

X, WEIGHT1, BIAS1, GATE, GATE_BIAS, WEIGHT2, BIAS2 = (1 << i for i in range(7))
_TENSORS = (
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, Tensor neurons"
)
# neurons, the kept ones without padding, are there for their number: for those who count FLOPs.
declare(
    "packed_mlp", f"({_TENSORS}, str activation, bool recompute) -> (Tensor out, Tensor hidden, Tensor g)"
)
declare(
    "packed_mlp_backward",
    f"(Tensor grad, {_TENSORS}, str activation, bool recompute, Tensor hidden, Tensor g, int needs) "
    "-> (Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor gate_weight, Tensor gate_bias, "
    "Tensor fc2_weight, Tensor fc2_bias)",
)


def _mlp(pieces: Pieces, x, weight1, bias1, gate, gate_bias, weight2, bias2, neurons, activation, recompute):
    M = x.shape[:-1].numel()
    u, g = _hidden(x.reshape(M, x.shape[-1]), weight1, bias1, gate, gate_bias)
    a = torch.empty_like(u)
    if a.numel():
        pieces.activate(u, g, activation, a)
    out = multiply(a, weight2.t(), bias2).view(*x.shape[:-1], weight2.shape[0])
    nothing = x.new_empty(0)
    return out, nothing if recompute else u, nothing if recompute or g is None else g


def _hidden(rows, weight1, bias1, gate, gate_bias):
    g = None if gate is None else multiply(rows, gate.t(), gate_bias)
    return multiply(rows, weight1.t(), bias1), g


def _mlp_backward(
    pieces: Pieces,
    grad,
    x,
    weight1,
    bias1,
    gate,
    gate_bias,
    weight2,
    bias2,
    neurons,
    activation,
    recompute,
    u,
    g,
    needs,
):
    M = x.shape[:-1].numel()
    grad, rows = grad.reshape(M, weight2.shape[0]), x.reshape(M, x.shape[-1])
    grad_x = grad_weight1 = grad_bias1 = grad_gate = grad_gate_bias = grad_weight2 = None
    if needs & ~BIAS2:
        if recompute:
            u, g = _hidden(rows, weight1, bias1, gate, gate_bias)
        a, grad_u = torch.empty_like(u), torch.empty_like(u)
        g, grad_g = (None, None) if gate is None else (g, torch.empty_like(g))
        if a.numel():
            pieces.activate_backward(u, g, grad @ weight2, activation, a, grad_u, grad_g)
        if needs & X:
            grad_x = grad_u @ weight1
            grad_x = (grad_x if gate is None else grad_x.addmm_(grad_g, gate)).view(x.shape)
        grad_weight1 = grad_u.t() @ rows if needs & WEIGHT1 else None
        grad_bias1 = bias_gradient(grad_u, bias1) if needs & BIAS1 else None
        grad_gate = grad_g.t() @ rows if needs & GATE else None
        grad_gate_bias = bias_gradient(grad_g, gate_bias) if needs & GATE_BIAS else None
        grad_weight2 = grad.t() @ a if needs & WEIGHT2 else None
    grad_bias2 = bias_gradient(grad, bias2) if needs & BIAS2 else None
    grads = (grad_x, grad_weight1, grad_bias1, grad_gate, grad_gate_bias, grad_weight2, grad_bias2)
    return given(grads, x)


def _fake(x, weight1, bias1, gate, gate_bias, weight2, bias2, neurons, activation, recompute):
    shape = (0,) if recompute else (x.shape[:-1].numel(), weight1.shape[0])
    out = x.new_empty(*x.shape[:-1], weight2.shape[0])
    return out, x.new_empty(shape), x.new_empty((0,) if gate is None else shape)


def _fake_backward(
    grad, x, weight1, bias1, gate, gate_bias, weight2, bias2, neurons, activation, recompute, u, g, needs
):
    return _autograd.empty_gradients((x, weight1, bias1, gate, gate_bias, weight2, bias2), needs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.recompute = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd makes zeros as large as what is saved.
    ctx.set_materialize_grads(False)


def define(provider: Provider) -> dict[str, Callable]:
    """The ops of this provider."""
    name = provider.define("packed_mlp", _mlp, _fake)
    provider.define("packed_mlp_backward", _mlp_backward, _fake_backward)
    packed_mlp, packed_mlp_backward = provider.op("packed_mlp"), provider.op("packed_mlp_backward")

    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        _autograd.forbid_double_backward("mlp")
        needs = _autograd.need_bits(ctx.needs_input_grad[:7])
        tensors, saved = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        grads = packed_mlp_backward(grad, *tensors, ctx.activation, ctx.recompute, *saved, needs)
        return *_autograd.asked_for(grads, needs), None, None, None

    torch.library.register_autograd(name, backward, setup_context=_setup_context)

    def run(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        kept: KeptNeurons,
        activation: str,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        packed: Sequence[Tensor | None] | None,
        recompute: bool,
    ) -> Tensor:
        if packed is None:
            packed = gather(
                *mlp_packing(fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, kept), x.dtype
            )
        return packed_mlp(x, *packed, fc2_bias, kept.neurons, activation, recompute)[0]

    return {"mlp": run}

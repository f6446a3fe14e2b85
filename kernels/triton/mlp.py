"""MLP over kept neurons on Triton: packed weights, vendor GEMMs, and one pass for the activation each way.

    u = x W1[F']^T + b1[F'],  out = act(u) W2[:, F']^T + b2;   backward: a = act(u) again, du = da * act'(u)

M tokens, D width, F hidden, F' kept neurons, padded with zeros to a multiple of 8 (act(0) = 0). Only u is
saved.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from .activation import activate, activate_backward
from .launch import align, inverse_of, multiply, planned, provide, register, to_device
from .packing import gather

X, FC1_WEIGHT, FC1_BIAS, FC2_WEIGHT, FC2_BIAS = (1 << i for i in range(5))


class _Plan(NamedTuple):
    """int32 on the device: index [F'] neuron per packed row, -1 = padding; whole [F] the other way round."""

    index: Tensor
    whole: Tensor


@planned
def _plan(tensors: Sequence[Tensor], F: int) -> _Plan:
    kept = tensors[0].tolist()
    if any(not 0 <= i < F for i in kept):
        raise ValueError(f"mlp: neurons must be positions in 0..{F - 1}")
    index = kept + [-1] * (align(len(kept)) - len(kept))
    return _Plan(*to_device(index + inverse_of(index, F), tensors[0].device).split([len(index), F]))


def _packed(fc1_weight, fc1_bias, fc2_weight, plan):
    bias = None if fc1_bias is None else fc1_bias.contiguous()
    return gather(fc1_weight.contiguous(), bias, fc2_weight.contiguous(), plan.index, plan.index)


def _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, neurons, activation):
    if any(t is not None and t.dtype != x.dtype for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)):
        raise ValueError("mlp: x and the weights must have one dtype")
    plan = _plan((neurons,), fc1_weight.shape[0])
    weight1, bias1, weight2 = _packed(fc1_weight, fc1_bias, fc2_weight, plan)
    M = x.shape[:-1].numel()
    hidden = x.new_empty(M, weight1.shape[0])
    multiply(hidden, x.reshape(M, x.shape[-1]), weight1.t(), bias1)
    a = torch.empty_like(hidden)
    activate(hidden, None, activation, a)
    out = x.new_empty(*x.shape[:-1], weight2.shape[0])
    multiply(out.view(M, weight2.shape[0]), a, weight2.t(), fc2_bias)
    return out, hidden


def _mlp_backward(grad, x, fc1_weight, fc1_bias, fc2_weight, neurons, activation, hidden, needs):
    plan = _plan((neurons,), fc1_weight.shape[0])
    weight1, _, weight2 = _packed(fc1_weight, None, fc2_weight, plan)
    M = x.shape[:-1].numel()
    grad, rows = grad.reshape(M, weight2.shape[0]), x.reshape(M, x.shape[-1])
    grad_x = grad_weight1 = grad_bias1 = grad_weight2 = grad_bias2 = None
    if needs & FC2_BIAS:
        grad_bias2 = grad.sum(0)
    if needs & (X | FC1_WEIGHT | FC1_BIAS | FC2_WEIGHT):
        grad_a, a, grad_hidden = grad @ weight2, torch.empty_like(hidden), torch.empty_like(hidden)
        activate_backward(hidden, None, grad_a, activation, a, grad_hidden, None)
        grad_weight2 = grad.t() @ a if needs & FC2_WEIGHT else None
        grad_x = (grad_hidden @ weight1).view(x.shape) if needs & X else None
        grad_weight1 = grad_hidden.t() @ rows if needs & FC1_WEIGHT else None
        grad_bias1 = grad_hidden.sum(0) if needs & FC1_BIAS else None
        grad_weight1, grad_bias1, grad_weight2 = gather(
            grad_weight1, grad_bias1, grad_weight2, plan.whole, plan.whole
        )
    grads = (grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, neurons, activation):
    hidden = x.new_empty(x.shape[:-1].numel(), align(neurons.shape[0]))
    return x.new_empty(*x.shape[:-1], fc2_weight.shape[0]), hidden


def _fake_backward(grad, x, fc1_weight, fc1_bias, fc2_weight, neurons, activation, hidden, needs):
    shapes = (x.shape, fc1_weight.shape, fc1_weight.shape[:1], fc2_weight.shape, fc2_weight.shape[:1])
    return _dispatch.empty_gradients(x, shapes, needs)


def _setup_context(ctx, inputs, output):
    x, fc1_weight, fc1_bias, fc2_weight, _, neurons, ctx.activation = inputs
    ctx.save_for_backward(x, fc1_weight, fc1_bias, fc2_weight, neurons, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx, grad, _):
    x, fc1_weight, fc1_bias, fc2_weight, neurons, hidden = ctx.saved_tensors
    _dispatch.forbid_double_backward("mlp")
    needs = _dispatch.need_bits(ctx.needs_input_grad[:5])
    grads = torch.ops.uvc_kernels.mlp_triton_backward(
        grad, x, fc1_weight, fc1_bias, fc2_weight, neurons, ctx.activation, hidden, needs
    )
    return *_dispatch.asked_for(grads, needs), None, None


def _run(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    neurons: Tensor,
    activation: str,
) -> Tensor:
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return torch.ops.uvc_kernels.mlp_triton(*tensors, neurons, activation)[0]


register(
    "mlp_triton",
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor neurons, "
    "str activation) -> (Tensor out, Tensor hidden)",
    _mlp,
    _fake,
    (_autograd_backward, _setup_context),
)
register(
    "mlp_triton_backward",
    "(Tensor grad, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor neurons, "
    "str activation, Tensor hidden, int needs) "
    "-> (Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias)",
    _mlp_backward,
    _fake_backward,
)
provide("mlp", _run)

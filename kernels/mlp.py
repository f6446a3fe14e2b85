"""Two-layer MLP that reads and multiplies kept neurons only.

    out = act(x W1[F']^T + b1[F']) W2[:, F']^T + b2,   F' the kept neurons

D width, F hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
}
_CODES = {
    name: code for code, name in enumerate(ACTIVATIONS)
}  # the order of `Activation` in csrc/cpu/loops.h


def mlp_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    neurons: Tensor,
    activation: str = "gelu",
) -> Tensor:
    """The formula in plain torch, any dtype and device, differentiable."""
    bias = None if fc1_bias is None else fc1_bias.index_select(0, neurons)
    hidden = ACTIVATIONS[activation](F.linear(x, fc1_weight.index_select(0, neurons), bias))
    return F.linear(hidden, fc2_weight.index_select(1, neurons), fc2_bias)


_dispatch.provide_reference("mlp", mlp_reference)


def _mlp_cpu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    neurons: Tensor,
    activation: str,
) -> Tensor:
    code = _CODES[activation]
    return torch.ops.uvc_kernels.mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, neurons, code)[0]


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, neurons, activation):
    out = x.new_empty(*x.shape[:-1], fc2_weight.shape[0])
    return out, x.new_empty(neurons.shape[0], x.shape[:-1].numel())


def _fake_backward(grad, x, fc1_weight, fc1_bias, fc2_weight, neurons, activation, hidden, needs):
    shapes = (x.shape, fc1_weight.shape, fc1_weight.shape[:1], fc2_weight.shape, fc2_weight.shape[:1])
    return _dispatch.empty_gradients(x, shapes, needs)


def _setup_context(ctx, inputs, output):
    x, fc1_weight, fc1_bias, fc2_weight, _, neurons, ctx.activation = inputs
    ctx.save_for_backward(x, fc1_weight, fc1_bias, fc2_weight, neurons, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    x, fc1_weight, fc1_bias, fc2_weight, neurons, hidden = ctx.saved_tensors
    _dispatch.forbid_double_backward("mlp")
    needs = _dispatch.need_bits(ctx.needs_input_grad[:5])
    grads = torch.ops.uvc_kernels.mlp_backward(
        grad, x, fc1_weight, fc1_bias, fc2_weight, neurons, ctx.activation, hidden, needs
    )
    return *_dispatch.asked_for(grads, needs), None, None


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::mlp", _fake)
    torch.library.register_fake("uvc_kernels::mlp_backward", _fake_backward)
    torch.library.register_autograd("uvc_kernels::mlp", _backward, setup_context=_setup_context)
    _dispatch.provide("mlp", "cpu", _mlp_cpu, "cpu", _dispatch.CPU_DTYPES)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    neurons: Tensor,
    activation: str = "gelu",
) -> Tensor:
    """MLP over the kept neurons.

    x [..., D], fc1_weight [F, D], fc1_bias [F] or None, fc2_weight [Dout, F], fc2_bias [Dout] or None, all of
    one floating dtype (autocast applies as to a linear layer); neurons: int64 indices in 0..F, ascending;
    activation: a key of `ACTIVATIONS`. Returns [..., Dout] in that dtype. Gradients are full-size, zero where
    removed. No kept neuron leaves the bias alone. ValueError on shapes that do not fit and on an unknown
    activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1 or fc1_weight.shape != (fc2_weight.shape[1], x.shape[-1]):
        raise ValueError(
            f"mlp: fc1_weight must be [{fc2_weight.shape[1]}, {x.shape[-1]}] to fit x and fc2_weight, "
            f"got {tuple(fc1_weight.shape)}"
        )
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = _dispatch.autocast(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    run = _dispatch.implementation("mlp", x.device, x.dtype)
    return run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, neurons, activation)

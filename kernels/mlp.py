"""Two-layer MLP, plain or gated, that reads and multiplies kept neurons only.

    out = act(x W1[F']^T + b1[F']) W2[:, F']^T + b2,   F' the kept neurons
    gated (SwiGLU and its like):  out = (act(x Wg[F']^T + bg[F']) * (x W1[F']^T + b1[F'])) W2[:, F']^T + b2

D width, F hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _dispatch, _dtypes, autotune
from .indices import KeptNeurons, all_of, along
from .weights import MlpWeights, Packed

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
}
# The order of `Activation` in csrc/cpu/loops.h and csrc/cuda/activate.cu.
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def mlp_reference(
    x: Tensor, weights: MlpWeights, kept: KeptNeurons, activation: str, packed: Packed, recompute: bool
) -> Tensor:
    """The formula in plain torch, any dtype and device, differentiable."""

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.index_select(0, kept.neurons).to(x.dtype)
        return F.linear(x, weight.index_select(0, kept.neurons).to(x.dtype), bias)

    w, act = weights, ACTIVATIONS[activation]
    hidden = linear(w.fc1_weight, w.fc1_bias)
    hidden = act(hidden) if w.gate_weight is None else act(linear(w.gate_weight, w.gate_bias)) * hidden
    return F.linear(hidden, *_dtypes.cast(x.dtype, w.fc2_weight.index_select(1, kept.neurons), w.fc2_bias))


_dispatch.provide_reference("mlp", mlp_reference)


def _fake(x, *arguments):
    weights = MlpWeights(*arguments[:6])
    # torch leaves out the last argument where it has its default.
    neurons, _, recompute = (*arguments[6:], False)[:3]
    rows = 0 if recompute else neurons.shape[0] * (1 if weights.gate_weight is None else 2)
    out = x.new_empty(*x.shape[:-1], weights.fc2_weight.shape[0])
    return out, x.new_empty(rows, math.prod(x.shape[:-1]), dtype=_dtypes.cpu_dtype(x.dtype))


def _fake_backward(grad, x, fc1_weight, fc1_bias, fc2_weight, gate_weight, gate_bias, *rest):
    fc1_bias, fc2_bias = fc1_weight.new_empty(len(fc1_weight)), fc2_weight.new_empty(len(fc2_weight))
    return _autograd.empty_gradients(
        (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc1_weight, fc1_bias), rest[-1]
    )


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::mlp", _fake)
    torch.library.register_fake("uvc_kernels::mlp_backward", _fake_backward)
    # The backward pass needs no fc2_bias.
    _call = _autograd.of_extension("mlp", 7, unused=4)

    def _cpu(
        x: Tensor, weights: MlpWeights, kept: KeptNeurons, activation: str, packed: Packed, recompute: bool
    ) -> Tensor:
        return _call(x, *weights, kept.neurons, CODES[activation], recompute)

    _dispatch.provide("mlp", "cpu", _cpu, "cpu", _dtypes.CPU_DTYPES)


def mlp_packing(
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    kept: KeptNeurons,
) -> tuple[list[Tensor | None], list[Tensor], list[Tensor], list[int]]:
    """What `gather` is to pack of one layer, in the order of `mlp(packed=)`."""
    sources = [fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, along(fc2_bias, fc2_weight)]
    # The output's bias stays whole; it comes along to be cast.
    every = all_of(fc2_weight.shape[0], fc2_weight.device)
    return sources, [*[kept.rows] * 5, every], [*[kept.whole] * 5, every], [0, 0, 0, 0, 1, 0]


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    kept: KeptNeurons,
    activation: str = "gelu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    packed: Packed = None,
    recompute: bool = False,
) -> Tensor:
    """MLP over the kept neurons.

    x [..., D], fc1_weight [F, D], fc1_bias [F] or None, fc2_weight [Dout, F], fc2_bias [Dout] or None, of a
    gated MLP also gate_weight [F, D] and gate_bias [F] or None, all of one floating dtype (autocast casts as
    for a linear layer, but only what is kept); activation: a key of `ACTIVATIONS`; packed: what `gather` made
    of `mlp_packing`, where several layers are packed at once; recompute: multiply for the hidden layer again
    in the backward pass instead of keeping it. Returns [..., Dout] in the dtype of x. Gradients are
    full-size, zero where removed. No kept neuron leaves the bias alone. ValueError on shapes that do not fit
    and on an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    weights = MlpWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias)
    for name, weight in (("fc1_weight", fc1_weight), ("gate_weight", gate_weight)):
        if weight is not None and (x.dim() < 1 or weight.shape != (fc2_weight.shape[1], x.shape[-1])):
            raise ValueError(
                f"mlp: {name} must be [{fc2_weight.shape[1]}, {x.shape[-1]}] to fit x and fc2_weight, "
                f"got {tuple(weight.shape)}"
            )
    if kept.whole.shape != fc2_weight.shape[1:]:
        raise ValueError(
            f"mlp: kept is of {len(kept.whole)} neurons, but fc2_weight has {fc2_weight.shape[1]}"
        )
    _dtypes.check_dtypes("mlp", x, *weights)
    x = _dtypes.autocast(x)
    arguments = x, weights, kept, activation, packed, recompute
    neurons = kept.neurons.shape[0], kept.whole.shape[0]
    packing = None if packed is None else lambda w: mlp_packing(*w[:2], *w[4:], *w[2:4], kept)
    case = (activation,)
    run = autotune.choose("mlp", arguments, *neurons, case=case, recompute=recompute, packing=packing)
    return run(*arguments)

"""MLP of a provider: pack, product, activation, product.

    u = x W1[rows]^T + b1[rows],   a = act(u)   or, with a gate,   a = act(x Wg[rows]^T + bg[rows]) u
    out = a W2[:, rows]^T + b2;    backward: a again, then du and, with a gate, dg

M tokens, D width; F' packed neurons (`..kept`), whose padding is zero everywhere as act(0) = 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autograd
from ..gather import gather
from ..indices import KeptNeurons
from ..mlp import mlp_packing
from ..weights import MlpWeights, Packed
from .pieces import Pieces, Provider, bias_gradients, declare, multiply

X, FC1_WEIGHT, FC1_BIAS, FC2_WEIGHT, FC2_BIAS, GATE_WEIGHT, GATE_BIAS = (1 << i for i in range(7))
_TENSORS = (
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? gate_weight, Tensor? gate_bias, Tensor neurons"
)
# neurons, the kept ones without padding, are there for their number: for those who count FLOPs.
declare(
    "packed_mlp", f"({_TENSORS}, str activation, bool recompute) -> (Tensor out, Tensor hidden, Tensor g)"
)
declare(
    "packed_mlp_backward",
    f"(Tensor grad, {_TENSORS}, str activation, bool recompute, Tensor hidden, Tensor g, int needs) "
    "-> (Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, "
    "Tensor gate_weight, Tensor gate_bias)",
)


class _Given(NamedTuple):
    """What the ops take behind x and the packed weights."""

    neurons: Tensor
    activation: str
    recompute: bool


def _named(arguments: Sequence) -> tuple[MlpWeights, _Given, Sequence]:
    # The arguments of an op behind x, by name.
    return MlpWeights(*arguments[:6]), _Given(*arguments[6:9]), arguments[9:]


def _mlp(pieces: Pieces, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, _ = _named(arguments)
    u, g = _hidden(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w)
    a = torch.empty_like(u)
    if a.numel():
        pieces.activate(u, g, given.activation, a)
    out = multiply(a, w.fc2_weight.t(), w.fc2_bias).view(*x.shape[:-1], w.fc2_weight.shape[0])
    return (out, None, None) if given.recompute else (out, u, g)


def _hidden(rows: Tensor, w: MlpWeights) -> tuple[Tensor, Tensor | None]:
    g = None if w.gate_weight is None else multiply(rows, w.gate_weight.t(), w.gate_bias)
    return multiply(rows, w.fc1_weight.t(), w.fc1_bias), g


def _mlp_backward(pieces: Pieces, grad: Tensor, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, (u, g, needs) = _named(arguments)
    M, gated = math.prod(x.shape[:-1]), w.gate_weight is not None
    grad, rows = grad.reshape(M, w.fc2_weight.shape[0]), x.reshape(M, x.shape[-1])
    grad_x = grad_fc1_weight = grad_fc2_weight = grad_gate_weight = of_fc1 = of_gate = None
    if needs & ~FC2_BIAS:
        if given.recompute:
            u, g = _hidden(rows, w)
        a, grad_u = torch.empty_like(u), torch.empty_like(u)
        g, grad_g = (g, torch.empty_like(g)) if gated else (None, None)
        if a.numel():
            pieces.activate_backward(u, g, grad @ w.fc2_weight, given.activation, a, grad_u, grad_g)
        if needs & X:
            grad_x = grad_u @ w.fc1_weight
            grad_x = (grad_x.addmm_(grad_g, w.gate_weight) if gated else grad_x).view(x.shape)
        grad_fc1_weight = grad_u.t() @ rows if needs & FC1_WEIGHT else None
        of_fc1 = (grad_u, w.fc1_bias) if needs & FC1_BIAS else None
        grad_fc2_weight = grad.t() @ a if needs & FC2_WEIGHT else None
        grad_gate_weight = grad_g.t() @ rows if needs & GATE_WEIGHT else None
        of_gate = (grad_g, w.gate_bias) if needs & GATE_BIAS else None
    of_fc2 = (grad, w.fc2_bias) if needs & FC2_BIAS else None
    grad_fc1_bias, grad_fc2_bias, grad_gate_bias = bias_gradients(pieces, of_fc1, of_fc2, of_gate)
    grads = (grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias, grad_gate_weight, grad_gate_bias)
    return grad_x, *grads


def _fake(x, *arguments):
    w, given, _ = _named(arguments)
    shape = (0,) if given.recompute else (math.prod(x.shape[:-1]), w.fc1_weight.shape[0])
    out = x.new_empty(*x.shape[:-1], w.fc2_weight.shape[0])
    return out, x.new_empty(shape), x.new_empty((0,) if w.gate_weight is None else shape)


def _fake_backward(grad, x, *arguments):
    return _autograd.empty_gradients((x, *arguments[:6]), arguments[-1])


def define(provider: Provider) -> dict[str, Callable]:
    """The ops of this provider."""
    forward, backward = (_mlp, _fake), (_mlp_backward, _fake_backward)
    packed_mlp = provider.differentiable("packed_mlp", "mlp", 7, forward, backward)

    def run(
        x: Tensor, weights: MlpWeights, kept: KeptNeurons, activation: str, packed: Packed, recompute: bool
    ) -> Tensor:
        w = weights
        if packed is None:
            sources = w.fc1_weight, w.fc1_bias, w.gate_weight, w.gate_bias, w.fc2_weight, w.fc2_bias
            packed = gather(*mlp_packing(*sources, kept), x.dtype)
        fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, fc2_bias = packed
        fc2_bias = w.fc2_bias if fc2_bias is None else fc2_bias
        w = MlpWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias)
        return packed_mlp(x, *w, kept.neurons, activation, recompute)

    return {"mlp": run}

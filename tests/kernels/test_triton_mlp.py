"""The MLP on Triton: accuracy, exact zeros, and that torch can trace it."""

import pytest
import torch
import uvc_kernels
from on_triton import DEVICE, DTYPES, check, forced, interpreted, random
from uvc_kernels.mlp import ACTIVATIONS

op = torch.ops.uvc_kernels.packed_mlp_triton.default
backward = torch.ops.uvc_kernels.packed_mlp_backward_triton.default


def inputs(hidden, shape=(2, 17), width=24, out=64, biases=True, gated=False):
    bias = (random(hidden), random(out)) if biases else (None, None)
    gate = [random(hidden, width) * 0.3, random(hidden) if biases else None] if gated else []
    return [random(*shape, width), random(hidden, width) * 0.3, bias[0], random(out, hidden), bias[1], *gate]


def keep(count, hidden):
    return uvc_kernels.kept_neurons(torch.randperm(hidden) < count, DEVICE)


def run(kept, activation="gelu"):
    """The op of x, fc1, its bias, fc2, its bias and perhaps a gate and its bias."""
    return lambda *tensors: uvc_kernels.mlp(*tensors[:5], kept, activation, *tensors[5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_as_exact_as_plain_torch(activation, dtype):
    check(run(keep(70, 90), activation), inputs(90, shape=(3, 50)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_gated_mlp_is_as_exact_as_plain_torch(activation, dtype):
    check(run(keep(70, 90), activation), inputs(90, shape=(3, 50), gated=True), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_activations_neither_overflow_nor_turn_nan(activation):
    # Many numbers near zero, where rounding in x W1 decides how wrong the slope is: one of them is luck.
    x, *rest = inputs(100, (3, 100))
    check(run(keep(80, 100), activation), [x * 40, *rest], torch.float32)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (0, 17), (2, 3, 4)], ids=str)
def test_leading_dims_are_free(shape):
    check(run(keep(5, 9)), inputs(9, shape=shape), torch.float32)


@interpreted
@pytest.mark.parametrize("kind", ["plain", "gated", "no neurons", "no biases"])
def test_opcheck_passes(kind):
    kept = 0 if kind == "no neurons" else 8
    tensors = inputs(kept, (2, 3), 24, 7, kind != "no biases", kind == "gated")
    tensors += [None] * (7 - len(tensors))
    given = (torch.arange(kept, device=DEVICE), "silu", False)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(op, (*leaves, *given))
    detached = [None if t is None else t.detach() for t in leaves]
    out, *saved = op(*detached, *given)
    there = sum(1 << i for i, t in enumerate(detached) if t is not None)
    for needs in (there, there & 0b0001001):
        torch.library.opcheck(backward, (torch.ones_like(out), *detached, *given, *saved, needs))


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_passes(activation):
    leaves = [t.requires_grad_() for t in inputs(6, shape=(2,), width=3, out=2, gated=activation == "silu")]
    assert torch.autograd.gradcheck(forced(run(keep(4, 6), activation)), leaves, fast_mode=True)

"""The MLP on Triton: accuracy, exact zeros, and that torch can trace it."""

import pytest
import torch
import uvc_kernels
from accuracy import with_gradients
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


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(count, torch.float32) for count in (0, 7, 100)]
    + [(1, torch.float16), (1536, torch.bfloat16)]
    + [
        pytest.param(count, dtype, marks=pytest.mark.slow)
        for count in (0, 1, 7, 100, 1536)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_any_number_of_neurons_is_as_exact_as_plain_torch(count, dtype):
    hidden = max(110, count)
    check(run(keep(count, hidden)), inputs(hidden), dtype)


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


def test_missing_biases_and_another_width_are_fine():
    check(run(keep(5, 9)), inputs(9, out=11, biases=False), torch.float32)


def test_gradients_of_removed_neurons_are_exactly_zero():
    kept = keep(20, 40)
    tensors = [t.float() for t in inputs(40, gated=True)]
    _, _, fc1, bias, fc2, _, gate, gate_bias = with_gradients(forced(run(kept)), tensors)
    removed = kept.whole.cpu() < 0
    for grad in (fc1, bias, gate, gate_bias):
        assert torch.count_nonzero(grad[removed]) == 0
    assert torch.count_nonzero(fc2[:, removed]) == 0
    assert fc1[~removed].abs().sum(1).min() > 0 and fc2[:, ~removed].abs().sum(0).min() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bit_equal(dtype):
    tensors, neurons = [t.to(dtype) for t in inputs(40, gated=True)], keep(33, 40)
    first, second = (with_gradients(forced(run(neurons)), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", range(5), ids=["x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"])
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen):
    tensors, neurons = [t.float() for t in inputs(12)], keep(7, 12)
    whole = with_gradients(forced(run(neurons)), tensors)[1:]
    leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    out = forced(run(neurons))(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(cotangent.bfloat16().to(out))
    for i, (leaf, grad) in enumerate(zip(leaves, whole, strict=True)):
        assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, grad)


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


def test_compiles_as_one_graph():
    neurons, tensors = keep(5, 9), [t.float() for t in inputs(9)]
    with uvc_kernels.backend("triton"):
        compiled = torch.compile(run(neurons), fullgraph=True, backend="aot_eager")
        found, expected = with_gradients(compiled, tensors), with_gradients(run(neurons), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

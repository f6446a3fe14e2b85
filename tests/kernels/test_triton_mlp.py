"""The MLP on Triton: accuracy, exact zeros, and that torch can trace it."""

import pytest
import torch
import uvc_kernels
from accuracy import with_gradients
from on_triton import DEVICE, DTYPES, check, forced, interpreted, random
from uvc_kernels.mlp import ACTIVATIONS

op = torch.ops.uvc_kernels.mlp_triton.default
backward = torch.ops.uvc_kernels.mlp_triton_backward.default


def inputs(hidden, shape=(2, 17), width=24, out=24, biases=True):
    bias = (random(hidden), random(out)) if biases else (None, None)
    return [random(*shape, width), random(hidden, width) * 0.3, bias[0], random(out, hidden), bias[1]]


def keep(count, hidden):
    return torch.randperm(hidden)[:count].sort().values.to(DEVICE)


def run(neurons, activation="gelu"):
    return lambda *tensors: uvc_kernels.mlp(*tensors, neurons, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 100, 1536])
def test_any_number_of_neurons_is_as_exact_as_plain_torch(count, dtype):
    hidden = max(110, count)
    check(run(keep(count, hidden)), inputs(hidden), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_as_exact_as_plain_torch(activation, dtype):
    check(run(keep(29, 40), activation), inputs(40, shape=(3, 50)), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_activations_neither_overflow_nor_turn_nan(activation):
    x, *rest = inputs(16)
    check(run(keep(9, 16), activation), [x * 40, *rest], torch.float32)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (0, 17), (2, 3, 4)], ids=str)
def test_leading_dims_are_free(shape):
    check(run(keep(5, 9)), inputs(9, shape=shape), torch.float32)


def test_missing_biases_and_another_width_are_fine():
    check(run(keep(5, 9)), inputs(9, out=11, biases=False), torch.float32)


def test_gradients_of_removed_neurons_are_exactly_zero():
    neurons = keep(20, 40)
    _, _, fc1, bias, fc2, _ = with_gradients(forced(run(neurons)), [t.float() for t in inputs(40)])
    removed = torch.ones(40, dtype=torch.bool)
    removed[neurons.cpu()] = False
    assert torch.count_nonzero(fc1[removed]) == torch.count_nonzero(bias[removed]) == 0
    assert torch.count_nonzero(fc2[:, removed]) == 0
    assert fc1[~removed].abs().sum(1).min() > 0 and fc2[:, ~removed].abs().sum(0).min() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bit_equal(dtype):
    tensors, neurons = [t.to(dtype) for t in inputs(40)], keep(33, 40)
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


def test_a_structure_that_is_written_in_place_is_seen():
    tensors, neurons = [t.float() for t in inputs(12)], torch.tensor([0, 3, 5], device=DEVICE)
    before = forced(run(neurons))(*tensors)
    neurons.copy_(torch.tensor([1, 3, 11]))
    after = forced(run(neurons))(*tensors)
    assert not torch.equal(before, after)
    assert torch.equal(after, forced(run(torch.tensor([1, 3, 11], device=DEVICE)))(*tensors))


@interpreted
@pytest.mark.parametrize("count", [0, 5])
def test_opcheck_passes(count):
    leaves = [t.requires_grad_() for t in inputs(9, shape=(2, 3), out=7)]
    neurons = keep(count, 9)
    torch.library.opcheck(op, (*leaves, neurons, "silu"))
    detached = [t.detach() for t in leaves]
    out, hidden = op(*detached, neurons, "silu")
    for needs in (0b11111, 0b01001):
        torch.library.opcheck(backward, (torch.ones_like(out), *detached[:4], neurons, "silu", hidden, needs))


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_passes(activation):
    leaves = [t.requires_grad_() for t in inputs(6, shape=(2,), width=3, out=2)]
    assert torch.autograd.gradcheck(forced(run(keep(4, 6), activation)), leaves, fast_mode=True)


def test_compiles_as_one_graph():
    neurons, tensors = keep(5, 9), [t.float() for t in inputs(9)]
    with uvc_kernels.backend("triton"):
        compiled = torch.compile(run(neurons), fullgraph=True, backend="aot_eager")
        found, expected = with_gradients(compiled, tensors), with_gradients(run(neurons), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_neuron_out_of_range_is_one_clear_line():
    tensors = [t.float() for t in inputs(9)]
    with uvc_kernels.backend("triton"), pytest.raises(ValueError, match=r"positions in 0\.\.8"):
        uvc_kernels.mlp(*tensors, torch.tensor([0, 9], device=DEVICE))

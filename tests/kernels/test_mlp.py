"""The MLP op: accuracy of every activation, exact zeros, and that torch can trace it."""

import pytest
import torch
import torch.nn.functional as F
import uvc_kernels
from accuracy import DTYPES, check, random, with_gradients
from uvc_kernels.mlp import ACTIVATIONS

op = torch.ops.uvc_kernels.mlp.default
backward = torch.ops.uvc_kernels.mlp_backward.default


def inputs(tokens, hidden=100, width=24, out=13, batch=2, biases=True):
    bias = (random(hidden), random(out)) if biases else (None, None)
    return [random(batch, tokens, width), random(hidden, width) * 0.3, bias[0], random(out, hidden), bias[1]]


def some(count, hidden=100):
    return uvc_kernels.kept_neurons(torch.randperm(hidden) < count)


def run(kept, activation="gelu"):
    """The op on (x, fc1, bias, fc2, bias) and, of a gated MLP, (gate, bias)."""
    return lambda *tensors: uvc_kernels.mlp(*tensors[:5], kept, activation, *tensors[5:])


def gate(hidden=100, width=24, biases=True):
    return [random(hidden, width) * 0.3, random(hidden) if biases else None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_its_slope_are_as_exact_as_plain_torch(activation, dtype):
    # An identity around the activation: each token of width 1 shows it one number.
    x = torch.cat([torch.linspace(-14, 14, 1001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 100, -100])])
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    check(run(some(1, 1), activation), [x.double()[None, :, None], one, zero, one, zero], dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_can_gate(activation):
    check(run(some(41), activation), inputs(17, biases=False) + gate(biases=False), torch.float32)
    # A gate of width 1 sees every number in reach of the activation, one per token.
    x = torch.linspace(-14, 14, 1001).double()
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    check(run(some(1, 1), activation), [x[None, :, None], one, zero, one, zero, one, zero], torch.float32)


def test_gelu_keeps_its_relative_accuracy_in_the_negative_tail():
    x = torch.linspace(-12, -1, 501)
    one = torch.ones(1, 1)
    found = uvc_kernels.mlp(x[:, None], one, None, one, None, some(1, 1))[:, 0].double()
    exact = 0.5 * x.double() * torch.erfc(-x.double() / 2**0.5)
    assert ((found - exact) / exact).abs().max() < 2e-5


def test_removed_neurons_are_absent_from_the_dense_formula():
    tensors, kept = inputs(17), some(41)
    on = torch.zeros(100, dtype=torch.float64)
    on[kept.neurons] = 1

    def multiplied(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)) * on, w2, b2)

    for found, expected in zip(
        with_gradients(run(kept), tensors), with_gradients(multiplied, tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_missing_biases_any_number_of_leading_dims_and_strides_are_fine():
    x, w1, _, w2, _ = inputs(17, biases=False)
    check(run(some(41)), [x[0], w1, None, w2, None], torch.float32)
    check(run(some(41)), [x[:, :, None, None], w1, None, w2, None], torch.float32)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1), w1.t().contiguous().t(), None, w2, None]
    check(run(some(41)), strided, torch.float32)


NAMES = ["x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gate_weight", "gate_bias"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtypes", ["float64", "float16", "bfloat16 with float32 weights"])
@pytest.mark.parametrize("kind", ["plain", "gated", "no biases"])
def test_opcheck_passes(kind, dtypes, recompute):
    tensors = inputs(5, hidden=9, width=4, out=3, biases=kind != "no biases")
    tensors += gate(9, 4) if kind == "gated" else [None, None]
    kinds = dtypes.split(" with ")
    dtype, weights = (getattr(torch, kinds[i].split()[0]) for i in (0, -1))
    tensors = [None if t is None else t.detach().to(weights) for t in tensors]
    tensors[0] = tensors[0].to(dtype)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    # What is saved must be right even where gradients are not compared to slow ones: opcheck only traces.
    torch.library.opcheck(op, (*leaves, some(4, 9).neurons, 0, recompute))
    out, hidden = op(*tensors, some(9, 9).neurons, 0, recompute)
    given = (*tensors[:4], *tensors[5:], some(9, 9).neurons, 0, hidden)
    for needs in (0b1111111, 0b0101001) if kind == "gated" else (0b11111, 0b01001):
        torch.library.opcheck(backward, (torch.ones_like(out), *given, needs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradcheck_passes(gated, count, activation):
    tensors = inputs(3, hidden=9, width=4, out=3) + (gate(9, 4) if gated else [])
    leaves = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(run(some(count, 9), activation), leaves)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_recomputing_the_hidden_layer_saves_nothing_and_changes_no_bit(gated):
    x, *weights = (t.detach().float() for t in inputs(17) + (gate() if gated else []))
    weights += [] if gated else [None, None]
    results = []
    for recompute in (False, True):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *weights)]
        out, hidden = op(*leaves, some(100).neurons, 0, recompute)
        assert hidden.numel() == (0 if recompute else 100 * 34 * (1 + gated))
        out.sum().backward()
        results.append([out, *(t.grad for t in leaves if t is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_autocast_casts_what_is_kept_and_returns_float32_gradients(gated):
    tensors, kept = [t.detach().float() for t in inputs(17) + (gate() if gated else [])], some(41)
    # Weights that bfloat16 holds exactly leave nothing to round; biases are added unrounded.
    exact = [t if t.dim() == 1 else t.bfloat16().float() for t in tensors]

    def cast(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return run(kept)(*given)

    found, wanted = with_gradients(cast, tensors), with_gradients(cast, exact)
    assert found[0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in found[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    truth = with_gradients(run(kept), [t.double() for t in exact])
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_the_raw_op_under_autocast_still_computes_in_the_dtype_of_its_inputs():
    tensors, kept = [t.detach().float() for t in inputs(17)], some(41)
    expected = op(*tensors, None, None, kept.neurons, 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*tensors, None, None, kept.neurons, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: (t, n, "softplus"), "unknown activation 'softplus'; use one of gelu"),
        (lambda t, n: ([t[0], t[1][:-1], *t[2:]], n, "gelu"), "fc1_weight must be"),
        (lambda t, n: (t, some(3, 99), "gelu"), "kept is of 99 neurons"),
        (lambda t, n: ([t[0].float(), *t[1:]], n, "gelu"), "one dtype"),
    ],
    ids=["activation", "short weight", "record of another layer", "mixed dtypes"],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    tensors, kept, activation = change(inputs(5), some(41))
    with uvc_kernels.backend("cpu"), pytest.raises((ValueError, RuntimeError), match=message) as caught:
        uvc_kernels.mlp(*tensors, kept, activation)
    assert "\n" not in str(caught.value)

"""What holds of attention, MLP and gated MLP alike, on every backend: exact zeros, odd inputs, tracing."""

from collections.abc import Callable
from typing import NamedTuple

import accuracy
import pytest
import torch
import uvc_kernels
from accuracy import forced, with_gradients
from backends import BACKENDS, case
from torch import Tensor

OUT = 20


class Case(NamedTuple):
    """x [2, 17, 24], weights and biases by name; the layer as a function of them; which rows of the first
    weights are removed, and which columns of the last one.
    """

    tensors: dict[str, Tensor]
    run: Callable[..., Tensor]
    rows: Tensor
    columns: Tensor


def attention(device, keep=0.5, heads=3, dims=8):
    A = heads * dims
    qk, v = torch.rand(2, heads, dims) < keep
    # Every head keeps other q/k dims than v dims; the first kept head has no q/k dim at all.
    if keep:
        v[0, 0], qk[0] = True, False
    kept = uvc_kernels.kept_heads(qk, v, device)
    shapes = {"x": (2, 17, 24), "qkv_weight": (3 * A, 24), "qkv_bias": (3 * A,), "proj_weight": (OUT, A)}
    removed = torch.ones(3 * A, dtype=torch.bool)
    removed[torch.cat([kept.qk, kept.qk + A, kept.v + 2 * A]).cpu()] = False
    run = lambda *tensors: uvc_kernels.attention(*tensors, kept, 0.25)  # noqa: E731
    return Case(numbers({**shapes, "proj_bias": (OUT,)}, device), run, removed, removed[2 * A :])


def mlp(device, keep=0.4, gated=False, hidden=40):
    kept = uvc_kernels.kept_neurons(torch.rand(hidden) < keep, device)
    shapes = {
        "x": (2, 17, 24),
        "fc1_weight": (hidden, 24),
        "fc1_bias": (hidden,),
        "fc2_weight": (OUT, hidden),
    }
    shapes["fc2_bias"] = (OUT,)
    if gated:
        shapes |= {"gate_weight": (hidden, 24), "gate_bias": (hidden,)}
    removed = kept.whole.cpu() < 0
    run = lambda *tensors: uvc_kernels.mlp(*tensors[:5], kept, "gelu", *tensors[5:])  # noqa: E731
    return Case(numbers(shapes, device), run, removed, removed)


def numbers(shapes, device):
    """Normal numbers, of which the first layer's weights are small."""
    first = ("qkv_weight", "fc1_weight", "gate_weight")
    return {n: (torch.randn(s) * (0.3 if n in first else 1)).to(device) for n, s in shapes.items()}


def gated_mlp(device, keep=0.4):
    return mlp(device, keep, gated=True)


LAYERS = {"attention": attention, "mlp": mlp, "gated mlp": gated_mlp}
LAST = ("proj_weight", "fc2_weight"), ("proj_bias", "fc2_bias")
on_every_backend = pytest.mark.parametrize(
    "backend", [case(name) for name in BACKENDS if name != "reference"]
)
of_every_layer = pytest.mark.parametrize("layer", LAYERS)


@on_every_backend
@of_every_layer
def test_gradients_of_removed_rows_and_columns_are_exactly_zero_and_others_are_not(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    _, *grads = with_gradients(forced(backend, made.run), made.tensors.values())
    for name, grad in list(zip(made.tensors, (grad.cpu() for grad in grads), strict=True))[1:]:
        if name in LAST[1]:
            continue
        removed, grad = (made.columns, grad.t()) if name in LAST[0] else (made.rows, grad)
        assert torch.count_nonzero(grad[removed]) == 0, name
        if grad.dim() == 2:
            assert grad[~removed].abs().sum(1).min() > 0, name


@on_every_backend
@of_every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_nothing_is_kept_only_the_output_bias_is_left(layer, backend, dtype):
    made = LAYERS[layer](BACKENDS[backend], keep=0.0)
    tensors = {name: t.to(dtype) for name, t in made.tensors.items()}
    out, *grads = with_gradients(forced(backend, made.run), tensors.values())
    for name, grad in zip(tensors, grads, strict=True):
        if name in LAST[1]:
            assert torch.equal(out, tensors[name].expand_as(out)) and grad.abs().min() > 0
        else:
            assert torch.count_nonzero(grad) == 0


@on_every_backend
@of_every_layer
def test_missing_biases_and_another_width_of_the_output_are_fine(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    without = [None if name.endswith("bias") else t.double() for name, t in made.tensors.items()]
    accuracy.check(made.run, without, torch.float32, backend)


@on_every_backend
@of_every_layer
def test_an_empty_batch_gives_empty_output_and_zero_gradients(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    x, *weights = made.tensors.values()
    out, *grads = with_gradients(forced(backend, made.run), [x[:0], *weights])
    assert out.shape == (0, 17, OUT) and all(torch.count_nonzero(grad) == 0 for grad in grads)


@on_every_backend
@of_every_layer
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    run, tensors = forced(backend, made.run), list(made.tensors.values())
    whole = with_gradients(run, tensors)[1:]
    cotangent = torch.randn((2, 17, OUT), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for frozen, name in enumerate(made.tensors):
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
        out = run(*leaves)
        out.backward(cotangent.bfloat16().to(out))
        for i, (leaf, grad) in enumerate(zip(leaves, whole, strict=True)):
            assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, grad), name


@on_every_backend
@of_every_layer
def test_strided_inputs_are_read_as_what_they_show(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    run, tensors = forced(backend, made.run), list(made.tensors.values())
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t for t in tensors]
    for found, wanted in zip(with_gradients(run, strided), with_gradients(run, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@on_every_backend
@of_every_layer
def test_nan_in_an_image_reaches_its_own_output_only(layer, backend):
    made = LAYERS[layer](BACKENDS[backend], keep=1.0)
    x, *weights = made.tensors.values()
    x[1, 5, 2] = float("nan")
    out = forced(backend, made.run)(x, *weights)
    assert out[1, 5].isnan().all() and not out[0].isnan().any()
    assert layer != "attention" or out[1].isnan().all()


@on_every_backend
@of_every_layer
def test_compiles_as_one_graph(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    with uvc_kernels.backend(backend):
        compiled = torch.compile(made.run, fullgraph=True, backend="aot_eager")
        found = with_gradients(compiled, made.tensors.values())
        expected = with_gradients(made.run, made.tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_every_backend
@of_every_layer
def test_a_second_derivative_is_a_clear_error(layer, backend):
    made = LAYERS[layer](BACKENDS[backend])
    x, *rest = made.tensors.values()
    out = forced(backend, made.run)(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)

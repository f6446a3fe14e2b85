"""The proximal shrink: in place, all layers in one call."""

import pytest
import torch
import uvc_kernels
from accuracy import DTYPES

SHAPES = [(5, 7), (300, 200), (31,), (1, 1), (0, 3), (3, 0), (3, 1), (1, 3), (197,), (64, 513)]


def example(dtype, dim):
    """Weights, dims and factors, of which a third is 1 and a fifth 0."""
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    dims = [0 if w.dim() == 1 else dim for w in weights]
    factors = torch.rand(sum(w.shape[d] for w, d in zip(weights, dims, strict=True)))
    factors[::3] = 1
    factors[::5] = 0
    return weights, factors, dims


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_every_group_is_multiplied_by_its_factor(provider, dim, dtype):
    weights, factors, dims = example(dtype, dim)
    sizes = [w.shape[d] for w, d in zip(weights, dims, strict=True)]
    expected = []
    for w, factor, d in zip(weights, factors.split(sizes), dims, strict=True):
        column = factor if w.dim() == 1 or d == 1 else factor[:, None]
        expected.append(
            (w.double() * column.double()).float().to(dtype) if dtype != torch.float64 else w * column
        )
    addresses = [w.data_ptr() for w in weights]
    with uvc_kernels.backend(provider):
        uvc_kernels.prox_shrink(weights, factors, dims)
    assert [w.data_ptr() for w in weights] == addresses
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)


def test_factor_zero_writes_zero_even_over_nan_and_factor_one_keeps_every_bit():
    weight = torch.tensor([[float("nan"), float("inf")], [float("nan"), 2.0]])
    for provider in ("cpu", "reference"):
        with uvc_kernels.backend(provider):
            w = weight.clone()
            uvc_kernels.prox_shrink([w], torch.tensor([0.0, 1.0]), [0])
            assert torch.equal(w[0], torch.zeros(2)) and w[1, 0].isnan() and w[1, 1] == 2


def test_a_slice_of_a_parameter_is_shrunk_in_the_parameter():
    weight = torch.nn.Parameter(torch.ones(6, 4))
    uvc_kernels.prox_shrink([weight[2:4]], torch.tensor([0.5, 0.0]), [0])
    assert weight[:, 0].tolist() == [1, 1, 0.5, 0, 1, 1] and weight.requires_grad


def test_a_strided_weight_is_an_error_not_a_lost_write():
    weight = torch.ones(4, 6)
    with uvc_kernels.backend("cpu"), pytest.raises((ValueError, RuntimeError), match="contiguous"):
        uvc_kernels.prox_shrink([weight[:, :2]], torch.zeros(2), [1])


def test_opcheck_passes():
    weights, factors, dims = example(torch.float32, 1)
    torch.library.opcheck(torch.ops.uvc_kernels.prox_shrink.default, (weights, factors, dims))


@pytest.mark.parametrize(
    ("shapes", "count", "dims", "message"),
    [
        ([(2, 3)], 2, [0, 1], "equally long"),
        ([(2, 3)], 3, [0], "flat with 2 entries"),
        ([(2, 3)], 2, [2], "weight 0"),
        ([(2, 2, 2)], 2, [0], "weight 0"),
    ],
    ids=["lengths", "factors", "no such dim", "three dims"],
)
def test_what_does_not_fit_is_one_clear_line(shapes, count, dims, message):
    with pytest.raises(ValueError, match=message):
        uvc_kernels.prox_shrink([torch.ones(shape) for shape in shapes], torch.ones(count), dims)

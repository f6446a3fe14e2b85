"""The proximal shrink on Triton: in place, all layers in one launch."""

import pytest
import torch
import uvc_kernels
from on_triton import DEVICE, DTYPES, forced, interpreted

SHAPES = [((12, 300), 0), ((70, 5), 1), ((7,), 0), ((1, 1), 0), ((0, 4), 0), ((3, 0), 0), ((97, 131), 1)]


def weights(dtype):
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape, _ in SHAPES]


DIMS = [dim for _, dim in SHAPES]
TOTAL = sum(shape[dim] for shape, dim in SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_shrink_as_in_plain_torch(dtype):
    expected = weights(dtype)
    found = [w.clone() for w in expected]
    factors = torch.rand(TOTAL).to(DEVICE)
    factors[::3], factors[1::3] = 0, 1
    with uvc_kernels.backend("reference"):
        uvc_kernels.prox_shrink(expected, factors, DIMS)
    forced(uvc_kernels.prox_shrink)(found, factors, DIMS)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)
        assert torch.equal(a == 0, b == 0)


def test_factor_one_touches_nothing_and_factor_zero_clears_nan():
    w = torch.full((4, 5), float("nan"), device=DEVICE)
    forced(uvc_kernels.prox_shrink)([w], torch.tensor([0.0, 1.0, 0.0, 0.5], device=DEVICE), [0])
    assert torch.count_nonzero(w[0]) == torch.count_nonzero(w[2]) == 0
    assert w[1].isnan().all() and w[3].isnan().all()


def test_what_is_not_contiguous_is_a_clear_error():
    with uvc_kernels.backend("triton"), pytest.raises(ValueError, match="contiguous"):
        uvc_kernels.prox_shrink([torch.ones(4, 5, device=DEVICE).t()], torch.ones(5, device=DEVICE), [0])


@interpreted
def test_opcheck_passes():
    op = torch.ops.uvc_kernels.prox_shrink_triton.default
    torch.library.opcheck(op, (weights(torch.float32), torch.rand(TOTAL), DIMS))

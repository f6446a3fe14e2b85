"""Group scores on Triton: all layers in one launch, any shapes together."""

import pytest
import torch
import uvc_kernels
from on_triton import DEVICE, DTYPES, forced, interpreted

SHAPES = [
    ((12, 300), 0),
    ((70, 5), 1),
    ((7,), 0),
    ((1, 1), 0),
    ((0, 4), 0),
    ((3, 0), 0),
    ((197, 65), 1),
    ((97, 3), 0),
]


def pairs(dtype):
    a = [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape, _ in SHAPES]
    return a, [torch.randn_like(t) for t in a], [dim for _, dim in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_many_shapes_are_as_exact_as_plain_torch(dtype):
    a, b, dims = pairs(dtype)
    with uvc_kernels.backend("reference"):
        exact = uvc_kernels.group_scores([t.double() for t in a], [t.double() for t in b], dims)
        plain = uvc_kernels.group_scores(a, b, dims)
    found = forced(uvc_kernels.group_scores)(a, b, dims)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    limit = 2 * (plain - exact).abs().max() + 5e-7 * exact.abs().max()
    assert (found - exact).abs().max() <= limit


def test_strided_and_changed_tensors_are_read_anew_and_repeats_are_bit_equal():
    a, b, dims = pairs(torch.float32)
    first = forced(uvc_kernels.group_scores)(a, b, dims)
    assert torch.equal(first, forced(uvc_kernels.group_scores)(a, b, dims))
    a[0] *= 2
    doubled = forced(uvc_kernels.group_scores)(a, b, dims)
    assert torch.equal(doubled[:12], 2 * first[:12]) and torch.equal(doubled[12:], first[12:])
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in a]
    assert torch.equal(doubled, forced(uvc_kernels.group_scores)(strided, b, dims))


@interpreted
def test_opcheck_passes():
    a, b, dims = pairs(torch.float32)
    torch.library.opcheck(torch.ops.uvc_kernels.group_scores_triton.default, (a, b, dims))


def test_mixed_dtypes_are_a_clear_error():
    a = [torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE).half()]
    with uvc_kernels.backend("triton"), pytest.raises(ValueError, match="one dtype"):
        uvc_kernels.group_scores(a, a, [0, 0])

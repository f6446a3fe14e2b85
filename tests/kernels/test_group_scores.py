"""Group scores: all layers in one call, against float64 sums."""

import pytest
import torch
import uvc_kernels
from accuracy import DTYPES

SHAPES = [(5, 7), (300, 200), (31,), (1, 1), (0, 3), (3, 0), (3, 1), (1, 3), (1000, 3), (197,), (64, 513)]


def pairs(dtype):
    return [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(2)]


def dims(dim):
    return [0 if len(shape) == 1 else dim for shape in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_scores_are_the_sums_of_products(dim, dtype):
    a, b = pairs(dtype)
    with uvc_kernels.backend("cpu"):
        found = uvc_kernels.group_scores(a, b, dims(dim))
    expected = []
    for x, y, axis in zip(a, b, dims(dim), strict=True):
        product = x.double() * y.double()
        expected.append(product if product.dim() == 1 else product.sum(1 - axis))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_the_reference_says_the_same(dim):
    a, b = pairs(torch.float32)
    with uvc_kernels.backend("reference"):
        expected = uvc_kernels.group_scores(a, b, dims(dim))
    torch.testing.assert_close(uvc_kernels.group_scores(a, b, dims(dim)), expected, rtol=1e-4, atol=1e-4)


def test_squared_norms_of_strided_slices_need_no_copy_by_the_caller():
    weight = torch.randn(12, 40)
    found = uvc_kernels.group_scores([weight[:, 8:16], weight[4:8]], [weight[:, 8:16], weight[4:8]], [1, 0])
    expected = torch.cat([weight[:, 8:16].square().sum(0), weight[4:8].square().sum(1)])
    torch.testing.assert_close(found, expected)


def test_repeats_and_thread_counts_are_bit_equal():
    a, b = pairs(torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(uvc_kernels.group_scores(a, b, dims(1)))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_scores_of_parameters_carry_no_gradient():
    weight = torch.randn(3, 4, requires_grad=True)
    assert not uvc_kernels.group_scores([weight], [weight], [0]).requires_grad


def test_no_pairs_give_no_scores():
    assert uvc_kernels.group_scores([], [], []).shape == (0,)


def test_opcheck_passes():
    a, b = pairs(torch.float32)
    torch.library.opcheck(torch.ops.uvc_kernels.group_scores.default, (a[:4], b[:4], dims(1)[:4]))


@pytest.mark.parametrize(
    ("a", "b", "axes", "message"),
    [
        ([(2, 3)], [], [0], "equally long"),
        ([(2, 3)], [(3, 2)], [0], "pair 0"),
        ([(2, 3)], [(2, 3)], [2], "pair 0"),
        ([(3,), (3,)], [(3,), (3,)], [0, 1], "pair 1"),
        ([(2, 2, 2)], [(2, 2, 2)], [0], "pair 0"),
    ],
    ids=["lengths", "shapes", "no such dim", "column of a vector", "three dims"],
)
def test_what_does_not_fit_is_one_clear_line(a, b, axes, message):
    a, b = ([torch.ones(shape) for shape in shapes] for shapes in (a, b))
    with pytest.raises(ValueError, match=message):
        uvc_kernels.group_scores(a, b, axes)

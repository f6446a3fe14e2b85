"""The gather op of the CPU: every pair of dtypes, padding, rows and columns, its gradient."""

import pytest
import torch
import uvc_kernels
from uvc_kernels.gather import gather_reference

op = torch.ops.uvc_kernels.gather.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def index_of(n, size):
    """`n` places in 0..size in random order, with -1 among them where `n` is larger, and the inverse."""
    places = torch.full((n,), -1, dtype=torch.int32)
    count = min(n, size)
    spots = torch.randperm(n)[:count]
    places[spots] = torch.randperm(size, dtype=torch.int32)[:count]
    inverse = torch.full((size,), -1, dtype=torch.int32)
    inverse[places[spots].long()] = spots.int()
    return places, inverse


def case(rows, columns, n, dim):
    source = torch.randn(rows, columns, dtype=torch.float64)
    index, inverse = index_of(n, source.shape[dim])
    return source, index, inverse, dim


def columns_of(cases):
    return [list(given) for given in zip(*cases, strict=True)]


SIZES = [
    (1, 1, 1, 0),
    (40, 7, 24, 0),
    (7, 40, 24, 1),
    (33, 197, 200, 1),
    (19, 3, 0, 0),
    (3, 19, 0, 1),
    (0, 5, 3, 0),
]


@pytest.mark.parametrize("out", DTYPES, ids=lambda d: f"to {d}")
@pytest.mark.parametrize("source", DTYPES, ids=lambda d: f"from {d}")
def test_many_matrices_in_one_call_equal_plain_torch(source, out):
    sources, indices, inverses, dims = columns_of(case(*size) for size in SIZES)
    sources = [torch.cat([t, t.new_tensor([float("inf")]).expand(1, t.shape[1])]) for t in sources]
    inverses = [
        torch.cat([i, i.new_tensor([-1])]) if d == 0 else i for i, d in zip(inverses, dims, strict=True)
    ]
    sources = [t.to(source) for t in sources]
    found = op(sources, indices, inverses, dims, out)
    wanted = gather_reference(sources, indices, inverses, dims, out)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == out and torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("source, out", [(a, b) for a in DTYPES for b in DTYPES])
def test_columns_in_their_order_are_picked_and_spread(width, source, out):
    """As a kept list gives them: whole registers are compressed and expanded."""
    matrix = torch.randn(5, width).to(source)
    for share in (0.0, 0.1, 0.5, 1.0):
        index = (torch.rand(width) < share).nonzero().flatten().int()
        inverse = torch.full((width,), -1, dtype=torch.int32)
        inverse[index.long()] = torch.arange(len(index), dtype=torch.int32)
        (picked,) = op([matrix], [index], [inverse], [1], out)
        assert torch.equal(picked, matrix[:, index.long()].to(out))
        (spread,) = op([picked], [inverse], [index], [1], source)
        wanted = torch.zeros_like(matrix)
        wanted[:, index.long()] = picked.to(source)
        assert torch.equal(spread, wanted)


@pytest.mark.parametrize(
    "values", [[0.0, -0.0, 1e-7, 6e-8, 65504.0, 65520.0, 1e30, float("nan"), float("-inf")]]
)
def test_casts_round_to_nearest_and_keep_what_is_not_finite(values):
    wide, index = torch.tensor(values), torch.arange(9, dtype=torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        (found,) = op([wide], [index], [index], [0], dtype)
        assert torch.equal(found.nan_to_num(7), wide.to(dtype).nan_to_num(7))
        assert torch.equal(found.isnan(), wide.isnan())


def test_vectors_and_strided_matrices_are_read_as_what_they_show():
    source, index, inverse, _ = case(24, 40, 16, 1)
    turned, vector = source.t().contiguous().t(), source[0]
    places = torch.tensor([3, -1, 0], dtype=torch.int32)
    found = op([turned, vector, source[:, 0]], [index, places, places], [inverse] * 3, [1, 0, 0], None)
    assert torch.equal(found[0], source[:, index.long()])
    assert found[1].tolist() == [vector[3], 0, vector[0]]
    assert found[2].tolist() == [source[3, 0], 0, source[0, 0]]


def test_the_gradient_spreads_what_was_packed_and_is_zero_elsewhere():
    with uvc_kernels.backend("cpu"):
        for dim in (0, 1):
            source, index, inverse, _ = case(12, 15, 8, dim)
            leaf = source.requires_grad_()
            assert torch.autograd.gradcheck(
                lambda t, i=index, j=inverse, d=dim: uvc_kernels.gather([t], [i], [j], [d]), leaf
            )
            (out,) = uvc_kernels.gather([leaf.float()], [index], [inverse], [dim], torch.bfloat16)
            out.float().sum().backward()
            kept = (inverse >= 0).double()
            assert torch.equal(leaf.grad, (kept[:, None] if dim == 0 else kept).expand(12, 15))


def test_opcheck_passes():
    sources, indices, inverses, dims = columns_of(case(*size) for size in SIZES[1:4])
    leaves = [t.float().requires_grad_() for t in sources]
    torch.library.opcheck(op, (leaves, indices, inverses, dims, torch.bfloat16))
    torch.library.opcheck(op, (leaves, indices, inverses, dims, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[1].__setitem__(0, g[1][0] + 40), "positions of the source"),
        (lambda g: g[1].__setitem__(0, g[1][0] - 40), "positions of the source"),
        (lambda g: g[1].__setitem__(0, g[1][0].long()), "int32"),
        (lambda g: g[3].__setitem__(0, 2), "dims must exist"),
        (lambda g: g[3].pop(), "equally long"),
        (lambda g: g[0].__setitem__(0, g[0][0].int()), "float32, float64"),
    ],
    ids=["beyond", "below", "int64 index", "dim", "lengths", "int source"],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    given = columns_of([case(40, 7, 24, 0)])
    change(given)
    with pytest.raises(RuntimeError, match=message) as caught:
        op(*given, None)
    assert "\n" not in str(caught.value)

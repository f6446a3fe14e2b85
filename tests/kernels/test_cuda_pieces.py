"""The small kernels of csrc/cuda: packing, activations, scores and shrinkage, against plain torch."""

import accuracy
import pytest
import torch
import uvc_kernels
from on_cuda import (  # noqa: F401
    CASES,
    PROVIDERS,
    at_the_end,
    fenced,
    on_every_build,
    on_every_type,
    ops,
    poisoned,
    statistics,
)
from uvc_kernels import cuda
from uvc_kernels.mlp import ACTIVATIONS

CASTS = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16),
]  # fmt: skip
# (rows, columns, dim, indices): vectors have no columns
SHAPES = [
    (7, 5, 0, 3), (40, 64, 0, 24), (40, 1032, 0, 9), (7, 5, 1, 8), (33, 64, 1, 40), (9, 700, 1, 1536),
    (100, None, 0, 37), (5, None, 0, 0), (1, 1, 0, 1), (8, 0, 0, 8), (300, 17, 0, 197),
]  # fmt: skip


def index_into(size, count):
    """Positions and -1, mixed."""
    return torch.randint(-1, max(size, 1), (count,), dtype=torch.int32).clamp(max=size - 1)


def gathered(source, index, dim, dtype):
    padding = source.new_zeros([1 if d == dim else n for d, n in enumerate(source.shape)])
    place = torch.where(index < 0, source.shape[dim], index)
    return torch.cat([source, padding], dim).index_select(dim, place).to(dtype)


@on_every_build
@pytest.mark.parametrize(("dtype", "to"), CASTS, ids=str)
def test_many_matrices_are_packed_and_cast_in_one_call(dtype, to, device):
    sources = [torch.randn(n if m is None else (n, m)).to(device, dtype) for n, m, _, _ in SHAPES]
    dims = [dim for *_, dim, _ in SHAPES]
    indices = [
        index_into(s.shape[d], n).to(device) for s, d, (*_, n) in zip(sources, dims, SHAPES, strict=True)
    ]
    expected = [gathered(s, i, d, to) for s, i, d in zip(sources, indices, dims, strict=True)]
    outs = [poisoned(*e.shape, dtype=to, device=device) for e in expected]
    ops.cuda_gather(sources, indices, dims, outs)
    for found, wanted in zip(outs, expected, strict=True):
        assert torch.equal(found, wanted)


@on_every_build
def test_more_matrices_than_one_launch_takes_are_packed(device):
    sources = [torch.full((3, 16), float(i), device=device) for i in range(450)]
    index = torch.tensor([2, -1], dtype=torch.int32, device=device)
    outs = [poisoned(2, 16, dtype=torch.float32, device=device) for _ in sources]
    ops.cuda_gather(sources, [index] * 450, [0] * 450, outs)
    for i, out in enumerate(outs):
        assert (out[0] == i).all() and (out[1] == 0).all()


def test_nothing_is_read_or_written_behind_a_tensor():
    # Each ends where memory ends: what touches a byte more ends the process.
    u, gate, grad, a, grad_u, grad_gate = (at_the_end(torch.randn(4004)) for _ in range(6))
    cuda._activate(u, gate, "gelu", a)
    cuda._activate_backward(u, gate, grad, "silu", a, grad_u, grad_gate)
    for shape in ((9, 13), (40, 64), (5, 1035)):
        source, other = at_the_end(torch.randn(shape)), at_the_end(torch.randn(shape))
        for dim in (0, 1):
            index = at_the_end(torch.arange(shape[dim], dtype=torch.int32).flip(0))
            out = at_the_end(torch.zeros(shape))
            ops.cuda_gather([source], [index], [dim], [out])
            assert torch.equal(out, source.flip(dim))
            expected = (source * other).sum(1 - dim)
            torch.testing.assert_close(ops.cuda_group_scores([source], [other], [dim]), expected)
            ops.cuda_prox_shrink([out], at_the_end(torch.full((shape[dim],), 0.5)), [dim])
            assert torch.equal(out, source.flip(dim) / 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_scores_do_not_depend_on_the_order_of_blocks(dim, monkeypatch):
    # What a block writes behind its own matrix, the block of the next would hide, were it always later.
    a, b = ([torch.randn(s) for s in ((7, 5), (9, 33), (300, 40))] for _ in range(2))
    found = ops.cuda_group_scores(a, b, [dim] * 3)
    monkeypatch.setenv("UVC_HOST_COPIES", "early")
    assert torch.equal(found, ops.cuda_group_scores(a, b, [dim] * 3))


def test_special_numbers_survive_every_cast():
    tiny, huge = torch.tensor([5.9e-8, -3e-6, 6.1e-5]), torch.tensor([65504.0, 65519.0, 65520.0, 3.3e38])
    numbers = torch.cat([torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")]), tiny, huge])
    numbers = torch.cat([numbers, torch.randn(4096).exp().log2() * 1e-5, torch.randn(4096)])
    index = torch.arange(len(numbers), dtype=torch.int32)
    for to in (torch.float16, torch.bfloat16):
        out, back = torch.empty(len(numbers), dtype=to), torch.empty(len(numbers))
        ops.cuda_gather([numbers], [index], [0], [out])
        ops.cuda_gather([out], [index], [0], [back])
        torch.testing.assert_close(out, numbers.to(to), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, numbers.to(to).float(), rtol=0, atol=0, equal_nan=True)


@on_every_type
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_activations_are_as_exact_as_plain_torch(activation, gated, provider, dtype):
    device = PROVIDERS[provider]
    # both ends, the middle densely, and a number of elements that is no multiple of 8
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.randn(3000), torch.tensor([0.0, -0.0])])
    u, gate, grad = (t.to(device, dtype) for t in (torch.randn(len(x)), x, torch.randn(len(x))))
    if not gated:
        u, gate = gate, None
    a, grad_u = (poisoned(len(x), dtype=dtype, device=device) for _ in range(2))
    grad_gate = poisoned(len(x), dtype=dtype, device=device) if gated else None
    twice = torch.empty_like(a)
    cuda._activate(u, gate, activation, a)
    cuda._activate_backward(u, gate, grad, activation, twice, grad_u, grad_gate)
    assert torch.equal(a, twice)

    def plain(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in ((u, gate) if gated else (u,))]
        act = ACTIVATIONS[activation]
        out = act(leaves[1]) * leaves[0] if gated else act(leaves[0])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    found = [a, grad_u, grad_gate] if gated else [a, grad_u]
    for mine, usual, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        error = (mine.double() - exact).abs().max().nan_to_num(float("inf"))
        allowed = 2 * (usual.double() - exact).abs().max() + accuracy.FLOOR[dtype] * exact.abs().max()
        assert error <= allowed


@on_every_type
def test_scores_of_many_matrices_are_exact(provider, dtype):
    device = PROVIDERS[provider]
    shapes = [
        (7, 5),
        (7, 5),
        (40, 64),
        (40, 64),
        (197, 1030),
        (300, 33),
        (100,),
        (1, 1),
        (9, 0),
        (0, 9),
        (6, 0),
    ]
    dims = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1]
    a, b = ([torch.randn(s).to(device, dtype) for s in shapes] for _ in range(2))
    found = ops.cuda_group_scores(a, b, dims)
    product = [x.double() * y.double() for x, y in zip(a, b, strict=True)]
    exact = torch.cat([p if p.dim() == 1 else p.sum(1 - d) for p, d in zip(product, dims, strict=True)])
    assert found.dtype == statistics(dtype) and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-5)
    assert torch.equal(found, ops.cuda_group_scores(a, b, dims))


@on_every_type
def test_shrinkage_multiplies_in_place_and_leaves_the_rest(provider, dtype):
    device = PROVIDERS[provider]
    shapes, dims = [(7, 5), (7, 5), (40, 64), (40, 64), (20, 1030), (100,), (0, 4)], [0, 1, 0, 1, 1, 0, 0]
    weights = [torch.randn(s).to(device, dtype) for s in shapes]
    factors = torch.rand(sum(s[d] for s, d in zip(shapes, dims, strict=True)))
    factors[::3], factors[1::3] = 1, 0
    factors = factors.to(device, statistics(dtype))
    expected = [w.clone() for w in weights]
    with uvc_kernels.backend("reference"):
        uvc_kernels.prox_shrink(expected, factors, dims)
    ops.cuda_prox_shrink(weights, factors, dims)
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


HEIGHTS = (0, 1, 7, 256, 2500)
WIDTHS = (8, 13, 16, 40, 1)


@on_every_type
@pytest.mark.parametrize("height", HEIGHTS)
def test_columns_are_summed_as_exactly_as_the_dtype_holds(height, provider, dtype):
    matrices = [torch.randn(height, width).to(PROVIDERS[provider], dtype) for width in WIDTHS]
    outs = [poisoned(width, dtype=dtype, device=PROVIDERS[provider]) for width in WIDTHS]
    ops.cuda_column_sums(matrices, outs)
    for matrix, out in zip(matrices, outs, strict=True):
        exact = matrix.double().sum(0)
        torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_sums_read_nothing_behind_a_matrix_and_repeat_in_any_order_of_blocks(monkeypatch):
    for shape in ((300, 24), (300, 13), (5, 1)):
        matrix, out, again = (
            at_the_end(torch.randn(shape)),
            at_the_end(torch.empty(shape[1])),
            torch.empty(shape[1]),
        )
        ops.cuda_column_sums([matrix], [out])
        with monkeypatch.context() as patch:
            patch.setenv("UVC_HOST_COPIES", "early")
            ops.cuda_column_sums([matrix], [again])
        assert torch.equal(out, again)
        torch.testing.assert_close(out, matrix.sum(0))


def test_shrinkage_keeps_nan_where_the_factor_is_one_and_drops_it_where_it_is_zero():
    weights = [torch.full((2, 9), float("nan"))]
    ops.cuda_prox_shrink(weights, torch.tensor([1.0, 0.0]), [0])
    assert weights[0][0].isnan().all() and (weights[0][1] == 0).all()


@pytest.mark.parametrize(("provider", "dtype"), CASES, ids=str)
def test_the_gathered_weights_have_the_gradient_of_plain_torch(provider, dtype):
    device = PROVIDERS[provider]
    kept = uvc_kernels.kept_neurons(torch.arange(40) % 3 == 0).to(device)
    sources = [torch.randn(s, dtype=torch.float64, device=device) for s in ((40, 24), (40,), (24, 40))]

    def gather(*sources):
        packed = uvc_kernels.gather(sources, [kept.rows] * 3, [kept.whole] * 3, [0, 0, 1])
        return torch.cat([p.flatten() for p in packed])

    accuracy.check(gather, sources, dtype, provider)
    accuracy.forced(provider, gather)(*(s.to(dtype) for s in sources))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: ops.cuda_gather([x], [i], [0], []), "equally long"),
        (lambda x, i: ops.cuda_gather([x], [i], [2], [x]), "dim one of theirs"),
        (lambda x, i: ops.cuda_gather([x], [i.long()], [0], [x]), "int32"),
        (lambda x, i: ops.cuda_gather([x.t()], [i], [0], [x]), "contiguous"),
        (lambda x, i: ops.cuda_gather([x.double()], [i], [0], [x]), "float64 is not cast"),
        (lambda x, i: ops.cuda_group_scores([x], [x.t()], [0]), "share"),
        (lambda x, i: ops.cuda_prox_shrink([x], torch.ones(3), [0]), "one per row"),
        (lambda x, i: ops.cuda_column_sums([x], [x[0, :5]]), "a sum in that dtype for each column"),
        (lambda x, i: ops.cuda_column_sums([x], []), "equally long"),
        (lambda x, i: ops.cuda_activate(x, None, 9, x.clone()), "unknown activation 9"),
        (lambda x, i: ops.cuda_activate(x, None, 0, x.clone()[:2]), "one dtype and shape"),
        (lambda x, i: ops.cuda_activate(x.int(), None, 0, x.int()), "float32, bfloat16"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(4, 6), torch.zeros(4, dtype=torch.int32))

"""Gathering on Triton: many matrices in one launch, cast on the way, and its gradient."""

import pytest
import torch
import uvc_kernels
from on_triton import DEVICE, forced, interpreted
from uvc_kernels.triton import gather as piece
from uvc_kernels.triton import launch

# Shape, dim and the number of places gathered: rows, columns, vectors, odd sizes, nothing.
JOBS = [
    ((40, 136), 0, 24),
    ((40, 136), 1, 56),
    ((40,), 0, 24),
    ((7, 5), 0, 3),
    ((300, 9), 1, 5),
    ((131,), 0, 1),
    ((1, 1), 1, 1),
    ((5, 8), 0, 0),
]


def job(shape, dim, count, dtype=torch.float32):
    """A source, an index with holes, and the place of each position in it."""
    n = shape[dim]
    index = torch.full((count + count // 3,), -1, dtype=torch.int32)
    kept = torch.randperm(n)[:count].sort().values.int()
    index[torch.randperm(len(index))[:count].sort().values] = kept
    inverse = torch.full((n,), -1, dtype=torch.int32)
    places = (index >= 0).nonzero().flatten()
    inverse[index[places].long()] = places.int()
    source = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return source, index.to(DEVICE), inverse.to(DEVICE), dim


def jobs(dtype=torch.float32):
    return [list(given) for given in zip(*(job(*each, dtype) for each in JOBS), strict=True)]


@pytest.mark.parametrize("even", [True, False], ids=["even sizes", "any sizes"])
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_gathered_is_what_plain_torch_gathers(dtype, out, even):
    given = [each[: 3 if even else None] for each in jobs(dtype)]
    with uvc_kernels.backend("reference"):
        expected = uvc_kernels.gather(*given, out)
    found = forced(uvc_kernels.gather)(*given, out)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_hundreds_of_matrices_share_one_launch(monkeypatch):
    sources = [torch.randn(3, 8, device=DEVICE) + i for i in range(300)]
    index = torch.tensor([2, -1, 0], dtype=torch.int32, device=DEVICE)
    outs = [torch.empty(3, 8, dtype=torch.bfloat16, device=DEVICE) for _ in sources]
    launches = recorded(monkeypatch)
    piece.gather(sources, [index] * 300, [0] * 300, outs)
    assert len(launches) == 1
    for source, out in zip(sources, outs, strict=True):
        assert torch.equal(out, torch.stack([source[2], source[0] * 0, source[0]]).bfloat16())


def recorded(monkeypatch):
    """A list to which every launch of the kernel adds its address table."""
    launches, kernel = [], piece._gather

    class Recorder:
        def __getitem__(self, grid):
            def run(table, *rest, **constants):
                launches.append(table)
                return kernel[grid](table, *rest, **constants)

            return run

    monkeypatch.setattr(piece, "_gather", Recorder())
    return launches


def test_addresses_are_copied_again_only_when_something_moved(monkeypatch):
    sources, indices, inverses, dims = jobs()
    outs = forced(uvc_kernels.gather)(sources, indices, inverses, dims)
    launches = recorded(monkeypatch)
    places = [i for i, out in enumerate(outs) if out.numel()]
    given = [[each[i] for i in places] for each in (sources, indices, dims, outs)]
    for _ in range(3):
        piece.gather(*given)
    given[0][0] = given[0][0].clone()
    piece.gather(*given)
    tables = [table.data_ptr() for table in launches]
    assert tables[0] == tables[1] == tables[2] != tables[3]


def test_sources_that_are_views_at_odd_addresses_are_read_rightly():
    flat = torch.randn(8 * 16 + 1, device=DEVICE)
    index = torch.arange(8, dtype=torch.int32, device=DEVICE)
    found = forced(uvc_kernels.gather)([flat[1:].view(8, 16)], [index], [index], [0])
    assert torch.equal(found[0], flat[1:].view(8, 16))


def test_gradients_are_spread_with_exact_zeros():
    sources, indices, inverses, dims = jobs()
    leaves = [s.requires_grad_() for s in sources]
    out = forced(uvc_kernels.gather)(leaves, indices, inverses, dims, torch.bfloat16)
    sum(packed.float().sum() for packed in out).backward()
    for leaf, inverse, dim in zip(leaves, inverses, dims, strict=True):
        kept = (inverse >= 0).float()
        shape = [-1 if d == dim else 1 for d in range(leaf.dim())]
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, kept.view(shape).expand(leaf.shape))


@interpreted
def test_opcheck_and_gradcheck_pass():
    sources, indices, inverses, dims = (each[3:7] for each in jobs(torch.float64))
    leaves = [s.requires_grad_() for s in sources]
    torch.library.opcheck(
        torch.ops.uvc_kernels.gather_triton.default, (leaves, indices, inverses, dims, None)
    )

    def run(*tensors):
        return tuple(forced(uvc_kernels.gather)(tensors, indices, inverses, dims))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_the_table_of_addresses_lives_where_the_tensors_do():
    assert launch.addresses(((1, 2**40), (3, 4)), torch.device(DEVICE)).tolist() == [1, 2**40, 3, 4]

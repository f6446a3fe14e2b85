"""Column sums on Triton: up to three matrices of one height, and one launch for the biases of each half."""

import pytest
import torch
import uvc_kernels
from on_triton import DEVICE, DTYPES
from uvc_kernels import packed
from uvc_kernels.packed.pieces import bias_gradients


def sums(*matrices):
    outs = [torch.full_like(matrix[0] if len(matrix) else matrix.sum(0), float("nan")) for matrix in matrices]
    packed.provided["triton"].column_sums(list(matrices), outs)
    return outs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [0, 1, 197, 1100])
@pytest.mark.parametrize("widths", [(16,), (24, 8), (40, 13, 1)], ids=str)
def test_columns_are_summed_as_exactly_as_the_dtype_holds(widths, height, dtype):
    matrices = [torch.randn(height, width, dtype=torch.float64).to(DEVICE, dtype) for width in widths]
    for found, matrix in zip(sums(*matrices), matrices, strict=True):
        exact = matrix.double().sum(0)
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_repeats_are_bit_equal():
    matrix = torch.randn(1100, 40, device=DEVICE)
    assert torch.equal(*sums(matrix), *sums(matrix.clone()))


def test_a_sum_does_not_depend_on_what_is_summed_with_it():
    matrix, odd = torch.randn(1100, 40, device=DEVICE), torch.randn(1100, 13, device=DEVICE)
    assert torch.equal(*sums(matrix), sums(matrix, odd)[0])


def test_each_half_sums_its_bias_gradients_in_one_launch(monkeypatch):
    launches = []
    pieces = packed.provided["triton"]
    keep = pieces.column_sums

    def counted(matrices, outs):
        launches.append([tuple(matrix.shape) for matrix in matrices])
        keep(matrices, outs)

    monkeypatch.setattr("uvc_kernels.packed.attention.bias_gradients", with_sums(counted))
    monkeypatch.setattr("uvc_kernels.packed.mlp.bias_gradients", with_sums(counted))
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 16), (48, 16), (48,), (16, 16), (16,), (32, 16), (32,), (16, 32), (16,)
    x, *w = (torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in shapes)
    dims, device = torch.ones(2, 8, dtype=torch.bool), torch.device(DEVICE)
    heads, neurons = uvc_kernels.kept_heads(dims, dims, device), torch.ones(32, dtype=torch.bool)
    with uvc_kernels.backend("triton"):
        out = uvc_kernels.attention(x, *w[:4], heads, 0.3)
        uvc_kernels.mlp(out, *w[4:], uvc_kernels.kept_neurons(neurons, device)).sum().backward()
    assert launches == [[(5, 32), (5, 16)], [(5, 48), (5, 16)]]


def with_sums(column_sums):
    """`bias_gradients` with this piece in place of its provider's."""
    return lambda pieces, *asked: bias_gradients(pieces._replace(column_sums=column_sums), *asked)

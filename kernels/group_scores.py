"""Scores of rows or columns of many matrices in one call.

    dim 0: score[i] = sum_j a[i, j] b[i, j]   (rows; of a vector: a[i] b[i])
    dim 1: score[j] = sum_i a[i, j] b[i, j]   (columns)

With b = a: squared norms; with b = gradient: first-order importance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _dispatch, _dtypes


def group_scores_reference(a: Sequence[Tensor], b: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """The formula in plain torch."""
    accumulate = torch.promote_types(a[0].dtype, torch.float32) if a else torch.float32
    scores = [torch.zeros(0, dtype=accumulate, device=a[0].device if a else None)]
    for first, second, dim in zip(a, b, dims, strict=True):
        product = first.to(accumulate) * second.to(accumulate)
        scores.append(product if product.dim() == 1 else product.sum(1 - dim))
    return torch.cat(scores)


_dispatch.provide_reference("group_scores", group_scores_reference)


def _group_scores_cpu(a: list[Tensor], b: list[Tensor], dims: list[int]) -> Tensor:
    return torch.ops.uvc_kernels.group_scores(a, b, dims)


def empty_scores(a, b, dims):
    """Fake output of the ops of every provider."""
    total = sum(t.shape[dim] for t, dim in zip(a, dims, strict=True))
    return a[0].new_empty(total, dtype=_dtypes.statistics_dtype(a[0].dtype))


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::group_scores", empty_scores)
    _dispatch.provide("group_scores", "cpu", _group_scores_cpu, "cpu", _dtypes.CPU_DTYPES)


def group_scores(a: Sequence[Tensor], b: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Sum of a*b over each row (dim 0) or column (dim 1) of every pair, concatenated.

    a, b: lists of tensors of equal shapes, [n, m] or [n] (then dim 0), one dtype and device; dims: 0 or 1 per
    pair. Returns a flat float32 tensor (float64 for float64 input), pair by pair; it carries no gradient.
    ValueError on lengths, shapes or dims that do not fit.
    """
    if not len(a) == len(b) == len(dims):
        raise ValueError(
            f"group_scores: a, b and dims must be equally long, got {len(a)}, {len(b)}, {len(dims)}"
        )
    for i, (first, second, dim) in enumerate(zip(a, b, dims, strict=True)):
        if first.shape != second.shape or first.dim() not in (1, 2) or dim not in range(first.dim()):
            raise ValueError(
                f"group_scores: pair {i} must be two vectors (dim 0) or two matrices (dim 0 or 1) of one "
                f"shape, got {tuple(first.shape)}, {tuple(second.shape)} and dim {dim}"
            )
    if not a:
        return torch.zeros(0)
    run = _dispatch.implementation("group_scores", a[0].device, a[0].dtype)
    with torch.no_grad():
        return run(list(a), list(b), list(dims))

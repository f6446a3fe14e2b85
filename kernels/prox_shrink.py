"""Scale rows or columns of many matrices in place, in one call: the proximal step of weighted group norms.

    dim 0: w[i, :] <- factor[i] w[i, :]      dim 1: w[:, j] <- factor[j] w[:, j]

With factor = 1 / (1 + 2 lr y) this is the prox of y ||w_group||^2; with 0 it snaps a group to zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _dispatch, _dtypes


def prox_shrink_reference(weights: Sequence[Tensor], factors: Tensor, dims: Sequence[int]) -> None:
    """The formula in plain torch; a factor of 0 writes zeros, even over infinities."""
    sizes = [w.shape[dim] for w, dim in zip(weights, dims, strict=True)]
    for w, factor, dim in zip(weights, factors.split(sizes), dims, strict=True):
        f = factor if w.dim() == 1 or dim == 1 else factor[:, None]
        w.copy_(torch.where(f == 0, 0, w * f))


_dispatch.provide_reference("prox_shrink", prox_shrink_reference)


def _prox_shrink_cpu(weights: list[Tensor], factors: Tensor, dims: list[int]) -> None:
    wide = _dtypes.statistics_dtype(weights[0].dtype)
    torch.ops.uvc_kernels.prox_shrink(weights, factors.to(wide).contiguous(), dims)


def nothing(weights, factors, dims):
    """Fake output of the ops of every provider."""
    return None


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::prox_shrink", nothing)
    _dispatch.provide("prox_shrink", "cpu", _prox_shrink_cpu, "cpu", _dtypes.CPU_DTYPES)


def prox_shrink(weights: Sequence[Tensor], factors: Tensor, dims: Sequence[int]) -> None:
    """Multiply row (dim 0) or column (dim 1) j of each weight by its factor, in place.

    weights: list of [n, m] or [n] (then dim 0), contiguous, of one dtype and device; factors: one flat
    floating tensor in the layout that `group_scores` returns; dims: 0 or 1 per weight. Rows with factor 1 are
    not touched, factor 0 writes exact zeros. No gradient is recorded. ValueError on shapes that do not fit.
    """
    if len(weights) != len(dims):
        raise ValueError(
            f"prox_shrink: weights and dims must be equally long, got {len(weights)} and {len(dims)}"
        )
    for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
        if w.dim() not in (1, 2) or dim not in range(w.dim()):
            raise ValueError(
                f"prox_shrink: weight {i} must be a vector (dim 0) or a matrix (dim 0 or 1), got shape "
                f"{tuple(w.shape)} and dim {dim}"
            )
    total = sum(w.shape[dim] for w, dim in zip(weights, dims, strict=True))
    if factors.shape != (total,):
        raise ValueError(
            f"prox_shrink: factors must be flat with {total} entries, got {tuple(factors.shape)}"
        )
    if not weights:
        return
    run = _dispatch.implementation("prox_shrink", weights[0].device, weights[0].dtype)
    with torch.no_grad():
        run(list(weights), factors, list(dims))

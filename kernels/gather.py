"""Kept rows and columns of many matrices, packed in one call: all layers' weights in one launch.

    dim 0: out[i, :] = source[index[i], :]   (of a vector: out[i] = source[index[i]])
    dim 1: out[:, j] = source[:, index[j]]                                        index -1 gives zeros

The gradient is the same gather by the inverse index: it spreads packed gradients over full-size ones and
writes the zeros of what was removed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _dispatch, _dtypes

SCHEMA = "(Tensor[] sources, Tensor[] indices, Tensor[] inverses, int[] dims, ScalarType? dtype) -> Tensor[]"


def gather_reference(
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    inverses: Sequence[Tensor],
    dims: Sequence[int],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """The formula in plain torch, differentiable."""
    out = []
    for source, index, dim in zip(sources, indices, dims, strict=True):
        # Index -1 reads the zeros behind the last row or column.
        padding = source.new_zeros([1 if d == dim else n for d, n in enumerate(source.shape)])
        place = torch.where(index < 0, source.shape[dim], index)
        out.append(torch.cat([source, padding], dim).index_select(dim, place).to(dtype or source.dtype))
    return out


_dispatch.provide_reference("gather", gather_reference)


def empty_gathered(sources, indices, inverses, dims, dtype):
    """Fake outputs of the ops of every provider."""
    shapes = [
        [index.shape[0] if d == dim else n for d, n in enumerate(source.shape)]
        for source, index, dim in zip(sources, indices, dims, strict=True)
    ]
    return [s.new_empty(shape, dtype=dtype or s.dtype) for s, shape in zip(sources, shapes, strict=True)]


def differentiate(name: str, op: Callable) -> None:
    """Gives the op `name` of a provider its gradient: the same op with the inverse indices."""

    def setup_context(ctx, inputs, output):
        sources, ctx.indices, ctx.inverses, ctx.dims, _ = inputs
        ctx.dtype = sources[0].dtype

    def backward(ctx, grads):
        # A frozen source costs nothing: only what is asked for is spread.
        asked = [i for i, need in enumerate(ctx.needs_input_grad[0]) if need]
        chosen = [[given[i] for i in asked] for given in (grads, ctx.inverses, ctx.indices, ctx.dims)]
        spread = dict(zip(asked, op(*chosen, ctx.dtype) if asked else (), strict=True))
        nothing = [None] * len(grads)
        return [spread.get(i) for i in range(len(grads))], nothing, nothing, None, None

    torch.library.register_autograd(name, backward, setup_context=setup_context)


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::gather", empty_gathered)
    differentiate("uvc_kernels::gather", torch.ops.uvc_kernels.gather)
    _dispatch.provide("gather", "cpu", torch.ops.uvc_kernels.gather, "cpu", _dtypes.CPU_DTYPES)


def gather(
    sources: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    inverses: Sequence[Tensor],
    dims: Sequence[int],
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Packs rows (dim 0), columns (dim 1) or entries of many tensors.

    sources: matrices [n, m] or vectors [n] (then dim 0) of one floating dtype and device, None stays None;
    indices: int32 positions or -1, one tensor each; inverses: for each position of that dim its place in the
    index, or -1 (`KeptHeads` and `KeptNeurons` hold both); dims: 0 or 1 each; dtype: of the results, the
    sources' by default. Differentiable. ValueError on lengths, shapes or dims that do not fit.
    """
    if not len(sources) == len(indices) == len(inverses) == len(dims):
        raise ValueError(
            "gather: sources, indices, inverses and dims must be equally long, got "
            f"{len(sources)}, {len(indices)}, {len(inverses)}, {len(dims)}"
        )
    given = [i for i, source in enumerate(sources) if source is not None]
    for i in given:
        source, inverse, dim = sources[i], inverses[i], dims[i]
        if dim not in range(min(2, source.dim())) or source.dim() > 2 or len(inverse) != source.shape[dim]:
            raise ValueError(
                f"gather: source {i} must be a vector (dim 0) or a matrix (dim 0 or 1) as long in that dim "
                f"as its inverse, got shape {tuple(source.shape)}, inverse {tuple(inverse.shape)}, dim {dim}"
            )
    if not given:
        return list(sources)
    chosen = [[each[i] for i in given] for each in (sources, indices, inverses, dims)]
    run = _dispatch.implementation("gather", chosen[0][0].device, chosen[0][0].dtype)
    packed = dict(zip(given, run(*chosen, dtype), strict=True))
    return [packed.get(i) for i in range(len(sources))]

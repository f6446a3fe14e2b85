"""The solver's ops by a provider's pieces: one launch for all layers."""

from collections.abc import Callable

from .. import _dtypes
from ..group_scores import empty_scores
from ..prox_shrink import nothing
from .pieces import Pieces, Provider, declare

declare("group_scores", "(Tensor[] a, Tensor[] b, int[] dims) -> Tensor")
declare("prox_shrink", "(Tensor(a!)[] weights, Tensor factors, int[] dims) -> ()")


def _scores(pieces: Pieces, a, b, dims):
    if any(t.dtype != a[0].dtype or t.device != a[0].device for t in (*a, *b)):
        raise ValueError("group_scores: all tensors must have one dtype and one device")
    return pieces.group_scores([t.contiguous() for t in a], [t.contiguous() for t in b], list(dims))


def _shrink(pieces: Pieces, weights, factors, dims):
    if any(not w.is_contiguous() or w.dtype != weights[0].dtype for w in weights):
        raise ValueError("prox_shrink: the weights must be contiguous and of one dtype")
    factors = factors.to(_dtypes.statistics_dtype(weights[0].dtype)).contiguous()
    pieces.prox_shrink(list(weights), factors, list(dims))


def define(provider: Provider) -> dict[str, Callable]:
    """The ops of this provider."""
    provider.define("group_scores", _scores, empty_scores)
    provider.define("prox_shrink", _shrink, nothing)
    scores, shrink = provider.op("group_scores"), provider.op("prox_shrink")
    return {"group_scores": lambda *a: scores(*a), "prox_shrink": lambda *a: shrink(*a)}

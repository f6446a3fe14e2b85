"""`uvc_kernels.gather` by one launch of a provider's piece, forward and backward."""

from collections.abc import Callable

from ..gather import SCHEMA, differentiate, empty_gathered
from .pieces import Pieces, Provider, declare

declare("gather", SCHEMA)


def _gather(pieces: Pieces, sources, indices, inverses, dims, dtype):
    out = empty_gathered(sources, indices, inverses, dims, dtype)
    places = [i for i, packed in enumerate(out) if packed.numel()]
    if places:
        sources, indices, dims = ([given[i] for i in places] for given in (sources, indices, dims))
        pieces.gather([s.contiguous() for s in sources], indices, dims, [out[i] for i in places])
    return out


def define(provider: Provider) -> dict[str, Callable]:
    """The op of this provider."""
    name = provider.define("gather", _gather, empty_gathered)
    op = provider.op("gather")
    differentiate(name, op)
    return {"gather": lambda *arguments: op(*arguments)}

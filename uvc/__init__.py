"""Compress vision transformers under one budget: heads, head dims, neurons, blocks, found while training."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader

from uvc.compaction import compact
from uvc.costs import cost
from uvc.elastic import set_budget
from uvc.io.hub import push_to_hub
from uvc.io.serialization import load, save
from uvc.io.weights import load_weights
from uvc.layers import UVCAttention, UVCMlp, convert, families
from uvc.structure import Structure, apply_structure, structure_of

__all__ = [
    "Structure",
    "UVCAttention",
    "UVCMlp",
    "apply_structure",
    "compact",
    "compress",
    "convert",
    "cost",
    "families",
    "load",
    "load_weights",
    "push_to_hub",
    "save",
    "set_budget",
    "structure_of",
]


def __getattr__(name: str):
    # The training room is heavy and only `compress` needs it.
    if name == "compress":
        from uvc.training.compress import compress

        return compress
    raise AttributeError(f"module 'uvc' has no attribute {name!r}")


# Where modules stood before they moved into rooms; scripts written then still find them there.
_MOVED = {
    "uvc.data": "uvc.training.data",
    "uvc.export": "uvc.io.export",
    "uvc.trainer": "uvc.training.trainer",
}


class _OldAddresses(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self) if name in _MOVED else None

    def exec_module(self, module) -> None:
        sys.modules[module.__name__] = import_module(_MOVED[module.__name__])


sys.meta_path.append(_OldAddresses())

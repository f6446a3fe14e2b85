"""Compress vision transformers under one budget: heads, head dims, neurons, blocks, found while training."""

from uvc.compaction import compact
from uvc.costs import cost
from uvc.io.serialization import load, save
from uvc.layers import UVCAttention, UVCMlp, convert
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
    "load",
    "save",
    "structure_of",
]


def __getattr__(name: str):
    # The training room is heavy and only `compress` needs it.
    if name == "compress":
        from uvc.training.compress import compress

        return compress
    raise AttributeError(f"module 'uvc' has no attribute {name!r}")

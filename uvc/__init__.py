"""Compress vision transformers under one budget: heads, head dims, neurons, blocks, found while training."""

from uvc.budget import cost
from uvc.checkpoint import load, save
from uvc.compact import compact
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
        from uvc.train import compress

        return compress
    raise AttributeError(f"module 'uvc' has no attribute {name!r}")

"""Tensors in, tensors out: the ops that skip pruned structure, each with a plain-torch reference."""

from ._dispatch import backend, select
from .attention import attention
from .gather import gather
from .group_scores import group_scores
from .kept import KeptHeads, KeptNeurons, kept_heads, kept_neurons
from .mlp import mlp
from .prox_shrink import prox_shrink

__all__ = [
    "KeptHeads",
    "KeptNeurons",
    "attention",
    "backend",
    "gather",
    "group_scores",
    "kept_heads",
    "kept_neurons",
    "mlp",
    "prox_shrink",
    "select",
]

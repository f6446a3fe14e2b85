"""Tensors in, tensors out: the ops that skip pruned structure, each with a plain-torch reference."""

from ._dispatch import backend, packs_ahead, select
from .attention import attention, attention_packing
from .gather import gather
from .group_scores import group_scores
from .indices import KeptHeads, KeptNeurons, kept_heads, kept_neurons
from .mlp import mlp, mlp_packing
from .prox_shrink import prox_shrink

__all__ = [
    "KeptHeads",
    "KeptNeurons",
    "attention",
    "attention_packing",
    "backend",
    "gather",
    "group_scores",
    "kept_heads",
    "kept_neurons",
    "mlp",
    "mlp_packing",
    "packs_ahead",
    "prox_shrink",
    "select",
]

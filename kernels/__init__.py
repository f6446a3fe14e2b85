"""Tensors in, tensors out: the ops that skip pruned structure, each with a plain-torch reference."""

from ._dispatch import backend, select
from .attention import KeptHeads, attention, kept_heads
from .group_scores import group_scores
from .mlp import mlp
from .prox_shrink import prox_shrink

__all__ = ["KeptHeads", "attention", "backend", "group_scores", "kept_heads", "mlp", "prox_shrink", "select"]

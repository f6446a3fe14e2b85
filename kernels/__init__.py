"""Tensors in, tensors out: the ops that skip pruned structure, each with a plain-torch reference."""

from importlib import import_module

from . import dense as dense
from . import self_check as self_check
from ._dispatch import backend, kernel_serves, packs_ahead, provide_later, select
from .attention import attention, attention_packing
from .attention_with_positions import Positions, attention_with_positions, turn_of
from .autotune import by_preference
from .gather import gather
from .group_scores import group_scores
from .indices import KeptHeads, KeptNeurons, kept_heads, kept_neurons
from .mlp import mlp, mlp_packing
from .prox_shrink import prox_shrink

__all__ = [
    "KeptHeads",
    "KeptNeurons",
    "Positions",
    "attention",
    "attention_packing",
    "attention_with_positions",
    "backend",
    "by_preference",
    "gather",
    "group_scores",
    "kept_heads",
    "kept_neurons",
    "kernel_serves",
    "mlp",
    "mlp_packing",
    "packs_ahead",
    "prox_shrink",
    "select",
    "turn_of",
]

provide_later("triton", lambda: import_module("uvc_kernels.triton"))
provide_later("cuda", lambda: import_module("uvc_kernels.cuda"))
provide_later("cuda-host", lambda: import_module("uvc_kernels.cuda"))

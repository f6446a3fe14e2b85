"""torch-pruning as a rival: `pip install torch-pruning`. It prunes heads, neurons and the residual width."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from bench.quality.context import Context, blank, macs_of

RATIOS = [i / 50 for i in range(1, 50)]


def magnitude(context: Context) -> nn.Module:
    """The same share of every layer, smallest group norms first."""
    return _scan(context, _tp().importance.GroupMagnitudeImportance(p=2), {})


def taylor(context: Context) -> nn.Module:
    """The same share of every layer, smallest first-order change first."""
    return _scan(context, _tp().importance.GroupTaylorImportance(), {})


def isomorphic(context: Context) -> nn.Module:
    """First-order importance, ranked together over all layers of the same kind (ECCV 2024)."""
    return _scan(
        context, _tp().importance.GroupTaylorImportance(), dict(global_pruning=True, isomorphic=True)
    )


def _tp() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise RuntimeError("arms tp_*: torch-pruning is not installed; pip install torch-pruning") from None
    return torch_pruning


def _scan(context: Context, importance: Any, options: dict) -> nn.Module:
    """Tries every ratio and keeps the costliest result within the budget; its cost is not monotone in the
    ratio.

    Where a layer is out of heads before the budget is reached, heads go at half the ratio, or not at all.
    """
    dense = copy.deepcopy(context.dense)
    dense.train()
    loss = context.loss()
    for images, labels in context.batches:
        loss(dense, images, labels)["loss"].backward()
    dense.eval()
    limit = context.budget * macs_of(context.dense)
    for of_heads in (1.0, 0.5, 0.0):
        best, best_macs = None, 0
        for ratio in RATIOS:
            model = _pruned(dense, ratio, of_heads * ratio, importance, options)
            if any(block.attn.num_heads == 0 for block in model.blocks):
                continue  # it counts a layer's heads down to none, which no longer runs
            macs = macs_of(model)
            if best_macs < macs <= limit:
                best, best_macs = model, macs
        if best is not None:
            best.zero_grad(set_to_none=True)
            return best
    raise ValueError(f"budget: {context.budget} is not reached at any ratio")


def _pruned(dense: nn.Module, ratio: float, of_heads: float, importance: Any, options: dict) -> nn.Module:
    model = copy.deepcopy(dense)
    for parameter, source in zip(model.parameters(), dense.parameters(), strict=True):
        parameter.grad = source.grad  # deepcopy leaves gradients behind
    attentions = [block.attn for block in model.blocks]
    for attention in attentions:
        attention.fused_attn = False  # the graph tracer does not know the fused product
    with warnings.catch_warnings():
        # Embeddings and layer scales are pruned along their last dim, which is right.
        warnings.filterwarnings("ignore", "Unwrapped parameters")
        pruner = _tp().pruner.BasePruner(
            model,
            blank(model),
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=[model.head],
            num_heads={attention.qkv: attention.num_heads for attention in attentions},
            prune_num_heads=True,
            head_pruning_ratio=of_heads,
            **options,
        )
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.proj.in_features
        attention.head_dim = attention.attn_dim // max(attention.num_heads, 1)
        attention.fused_attn = True
    return model

"""A model with a structure -> a physically smaller model of plain torch, and the check that they agree."""

import copy

import torch
from torch import Tensor, nn

from uvc.elastic import STRUCTURES
from uvc.layers import CompactBlock, check, check_children, like
from uvc.structure import Structure, fit_structure, structure_of


def compact(model: nn.Module) -> nn.Module:
    """A copy of `model` that holds only what its structure keeps; `model` itself is untouched.

    It computes what `model` computes, without any op of uvc_kernels: kept rows and columns in smaller linear
    layers, heads of equal size as one batched product, nothing of a skipped half. It stays a timm-style
    module (`patch_embed`, `blocks`, `forward_features`). Hooks on blocks, attention and MLP go along.
    ValueError when the model is compacted already, or a child of an attention or MLP does more than its
    weights say (an adapter, a hook, an int8 layer).
    """
    return compacted(model, structure_of(model))


def compacted(model: nn.Module, structure: Structure) -> nn.Module:
    """A compacted copy of a timm or converted `model`, on any device, also meta, with the structure given."""
    check(model)
    check_children(model)
    kept = zip(model.blocks, structure.blocks, fit_structure(model, structure), strict=True)
    blocks = [CompactBlock(*block) for block in kept]
    # The memo says that the copy of the blocks is there already, so that the full blocks are not copied.
    small = copy.deepcopy(model, {id(model.blocks): like(model.blocks, blocks)})
    vars(small).pop(STRUCTURES, None)
    return small


def equivalent(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    """The largest difference of the two models' outputs on images x, over the largest output of `model`."""
    outputs = []
    for m in (model, small):
        training = m.training
        with torch.no_grad():
            outputs.append(m.eval()(x))
        m.train(training)
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())

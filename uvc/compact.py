"""A model with a structure -> a physically smaller model of plain torch modules, and the check that they agree."""

import copy

import torch
from torch import Tensor, nn

from uvc.layers import CompactBlock
from uvc.structure import Structure, fit, sizes_of, structure_of


def compact(model: nn.Module) -> nn.Module:
    """A copy of `model` that holds only what its structure keeps; `model` itself is untouched.

    It computes what `model` computes, without any op of uvc_kernels: kept rows and columns in smaller linear layers,
    heads of equal size as one batched product, a skipped half without any module. It stays a timm-style module.
    """
    return compacted(model, structure_of(model))


def compacted(model: nn.Module, structure: Structure) -> nn.Module:
    """A compacted copy of a timm or converted `model`, on any device, also meta, with the structure given."""
    sizes = sizes_of(model)
    fit(structure, sizes)
    # The full blocks are not copied: the memo says that their copy is already there.
    blocks = (
        CompactBlock(block, kept, sizes) for block, kept in zip(model.blocks, structure.blocks, strict=True)
    )
    return copy.deepcopy(model, {id(model.blocks): type(model.blocks)(*blocks)})


def equivalent(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    """The largest difference between the outputs of both models on images x, over the largest output of `model`."""
    outputs = []
    for m in (model, small):
        training = m.training
        with torch.no_grad():
            outputs.append(m.eval()(x))
        m.train(training)
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())

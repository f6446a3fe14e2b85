"""One model for several budgets: nested structures that stay with it, and the switch between them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from uvc.layers import blocks_of
from uvc.layers.prunable import device_of
from uvc.structure import Structure, apply_structure, fit_structure

STRUCTURES = "uvc_structures"  # the attribute of a model that has some
# By model, what its blocks derived from a structure, by budget and device: part of no copy or file.
_SELECTIONS: WeakKeyDictionary[nn.Module, dict[tuple[float, torch.device], list[Any]]] = WeakKeyDictionary()


def make_elastic(model: nn.Module, structures: Mapping[float, Structure]) -> nn.Module:
    """Gives a model its structures by budget, largest first, and the first of them, in place.

    ValueError when one does not fit the model, or keeps what that of a larger budget does not.
    """
    structures = dict(sorted(structures.items(), reverse=True))
    for structure in structures.values():
        fit_structure(model, structure)
    for larger, smaller in pairwise(structures):
        if not structures[larger].contains(structures[smaller]):
            raise ValueError(f"the structure at {smaller} keeps what that at {larger} does not")
    setattr(model, STRUCTURES, structures)
    _SELECTIONS.pop(model, None)
    return set_budget(model, next(iter(structures)))


def structures_of(model: nn.Module) -> dict[float, Structure]:
    """The structures of an elastic model by budget, largest first; {} of any other."""
    return dict(vars(model).get(STRUCTURES, {}))


def set_budget(model: nn.Module, budget: float) -> nn.Module:
    """Switches an elastic model, of ``compress`` or ``load``, to one of its budgets, in place; weights stay.

    What follows from a structure is derived at the first switch to it. Returns the model. ValueError, naming
    the budgets there are, for any other.
    """
    structures = structures_of(model)
    if budget not in structures:
        known = ", ".join(map(str, structures))
        if not known:
            raise ValueError(f"budget: {budget!r}, but this model has only one structure; leave it out")
        raise ValueError(f"budget: {budget!r} is none of this model's, {known}")
    known, place = _SELECTIONS.setdefault(model, {}), (budget, device_of(model))
    if place in known:
        for block, selection in zip(blocks_of(model), known[place], strict=True):
            block.select(selection)
        return model
    with torch.inference_mode(False):  # training may read them later
        apply_structure(model, structures[budget])
    known[place] = [block.selection() for block in blocks_of(model)]
    return model


def structures_to_data(structures: Mapping[float, Structure]) -> dict[str, Any]:
    """Structures as JSON takes them."""
    return {repr(budget): structure.to_data() for budget, structure in structures.items()}


def structures_from_data(data: object) -> dict[float, Structure]:
    """Inverse of `structures_to_data`; ValueError, in one line, for anything else."""
    if not isinstance(data, dict) or not data:
        raise ValueError("structures must be an object of structures by budget")
    try:
        found = {float(budget): Structure.from_data(structure) for budget, structure in data.items()}
    except ValueError as error:
        raise ValueError(f"structures: {error}") from None
    if not all(0.0 < budget <= 1.0 for budget in found):
        raise ValueError(f"structures: their budgets must be in (0, 1], got {', '.join(data)}")
    return found

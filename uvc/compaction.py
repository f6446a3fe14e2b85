"""A model with a structure -> a physically smaller model of plain torch, and the check that they agree."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uvc.elastic import STRUCTURES
from uvc.layers import FORMS, blocks_of, check, check_children, compact_kind, replaced
from uvc.structure import Structure, fit_structure, structure_of


def compact(model: nn.Module, form: str | Sequence[str] = "grouped") -> nn.Module:
    """A copy of `model` that holds only what its structure keeps; `model` itself is untouched.

    It computes what `model` computes, without any op of uvc_kernels: kept rows and columns in smaller linear
    layers, nothing of a skipped half. It stays a timm-style module (`patch_embed`, `blocks`,
    `forward_features`). Hooks on blocks, attention and MLP go along.

    Args:
        form: how the kept heads of a layer run. "grouped": heads of equal size as one batched product;
            "padded": all as one, with zeros up to one size, which adds products and saves calls. One for all
            blocks, or one for each; `uvc compact --for` measures both. Costs count what is kept.

    ValueError when the model is compacted already, or a child of an attention or MLP does more than its
    weights say (an adapter, a hook, an int8 layer).
    """
    return compacted(model, structure_of(model), form)


def compacted(model: nn.Module, structure: Structure, form: str | Sequence[str] = "grouped") -> nn.Module:
    """A compacted copy of a timm or converted `model`, on any device, also meta, with the structure given."""
    check(model)
    check_children(model)
    blocks = blocks_of(model)
    forms = check_forms(form, len(blocks))
    kept = zip(blocks, structure.blocks, fit_structure(model, structure), forms, strict=True)
    return _with_blocks(model, [compact_kind(block)(block, *how) for block, *how in kept])


def forms_of(model: nn.Module) -> tuple[str, ...]:
    """How the heads of each block of a compacted model run."""
    return tuple(block.form for block in blocks_of(model))


def in_form(model: nn.Module, form: str | Sequence[str]) -> nn.Module:
    """A copy of a compacted model whose heads run in the form given, one for all blocks or one for each."""
    blocks = blocks_of(model)
    forms = check_forms(form, len(blocks))
    return _with_blocks(model, [b.in_form(f) for b, f in zip(blocks, forms, strict=True)])


def check_forms(form: object, blocks: int) -> tuple[str, ...]:
    """The form of each block; ValueError unless `form` is one of `FORMS`, or a list of one per block."""
    forms = (form,) * blocks if isinstance(form, str) else form
    if not isinstance(forms, list | tuple) or len(forms) != blocks or any(f not in FORMS for f in forms):
        raise ValueError(
            f"form must be one of {', '.join(FORMS)}, or one for each of {blocks} blocks, got {form!r:.80}"
        )
    return tuple(forms)


def _with_blocks(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    # The memo says that the copy of the blocks is there already, so that the full blocks are not copied.
    small = copy.deepcopy(model, replaced(model, blocks))
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

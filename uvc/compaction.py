"""A model with a structure -> a physically smaller model of plain torch, and the check that they agree."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uvc.elastic import STRUCTURES
from uvc.layers import (
    FORMS,
    blocks_of,
    check,
    check_children,
    compact_kind,
    heads_in_groups,
    joined,
    replaced,
    sizes_of,
)
from uvc.structure import Structure, fit_structure, structure_of

# What one product less is worth with one image, in multiply-accumulates: calls, and smaller products.
PER_PRODUCT = 2_500_000
PATCHES = 196  # of a model without an input size of its own


def compact(model: nn.Module, form: str | Sequence[str] = "grouped") -> nn.Module:
    """A copy of `model` that holds only what its structure keeps; `model` itself is untouched.

    It computes what `model` computes, without any op of uvc_kernels: kept rows and columns in smaller linear
    layers, nothing of a skipped half. It stays a timm-style module (`patch_embed`, `blocks`,
    `forward_features`). Hooks on blocks, attention and MLP go along.

    Args:
        form: how the kept parts of a block run. "grouped": heads of equal size as one batched product;
            "padded": all heads as one, with zeros up to one size, and neurons to a multiple of 8, which adds
            arithmetic and saves calls. One for all blocks, or one for each; "auto": what a rule expects to be
            faster with one image; `uvc compact --for` measures both. Costs count what is kept, which
            is what "grouped" runs.

    ValueError when the model is compacted already, or a child of an attention or MLP does more than its
    weights say (an adapter, a hook, an int8 layer).
    """
    return compacted(model, structure_of(model), form)


def compacted(model: nn.Module, structure: Structure, form: str | Sequence[str] = "grouped") -> nn.Module:
    """A compacted copy of a timm or converted `model`, on any device, also meta, with the structure given."""
    check(model)
    check_children(model)
    blocks = blocks_of(model)
    forms = quick_forms(model, structure) if form == "auto" else check_forms(form, len(blocks))
    kept = zip(blocks, structure.blocks, fit_structure(model, structure), forms, strict=True)
    return _with_blocks(model, [compact_kind(block)(block, *how) for block, *how in kept])


def forms_of(model: nn.Module) -> tuple[str, ...]:
    """How what is kept of each block of a compacted model runs."""
    return tuple(block.form for block in blocks_of(model))


def form_for(device: torch.device) -> str:
    """The form that a run on `device` saves: on a GPU each size of heads would be calls of its own."""
    return "padded" if device.type == "cuda" else "grouped"


def quick_forms(model: nn.Module, structure: Structure) -> tuple[str, ...]:
    """The form of each block that a rule expects to be faster with one image: it depends on nothing measured.

    Padded heads are one product instead of several, each of which is worth `PER_PRODUCT`; without heads of
    different sizes there is only rounding, which is worth its arithmetic.
    """
    s, forms = sizes_of(model), []
    patches = s.patches or PATCHES
    for i, (block, size) in enumerate(zip(structure.blocks, s.each, strict=True)):
        groups = heads_in_groups(block, "grouped", size.head_dim)
        padded = heads_in_groups(block, "padded", size.head_dim)
        kept, whole = (sum(len(g.heads) * (g.dq + g.dv) for g, _ in found) for found in (groups, padded))
        reads, attn = s.reads(i, patches, patches), s.layers[i][0]
        dim = reads.tokens * max(attn.unit_cost(family).macs for family in ("qk", "v")) + reads.pairs
        forms.append("padded" if (whole - kept) * dim <= PER_PRODUCT * max(len(groups), 1) else "grouped")
    return tuple(forms)


def in_form(
    model: nn.Module, form: str | Sequence[str], halves: tuple[str, ...] = ("attn", "mlp")
) -> nn.Module:
    """A copy of a compacted model whose blocks, or these halves of them, run in the form given, one for all
    blocks or one for each.
    """
    blocks = blocks_of(model)
    forms = check_forms(form, len(blocks))
    return _with_blocks(model, [b.in_form(f, halves) for b, f in zip(blocks, forms, strict=True)])


def check_forms(form: object, blocks: int) -> tuple[str, ...]:
    """The form of each block; ValueError unless `form` is one of `FORMS`, or a list of one per block."""
    forms = (form,) * blocks if isinstance(form, str) else form
    if not isinstance(forms, list | tuple) or len(forms) != blocks or any(f not in FORMS for f in forms):
        raise ValueError(
            f"form must be one of {', '.join(FORMS)}, auto, or one for each of {blocks} blocks, "
            f"got {form!r:.80}"
        )
    return tuple(forms)


def _with_blocks(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    # The memo says that the copy of the blocks is there already, so that the full blocks are not copied.
    small = copy.deepcopy(model, replaced(model, list(joined(model, blocks))))
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

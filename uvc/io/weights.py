"""Weights of other people into a model: renamed, resampled by timm, checked as a whole, then loaded."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv, is_model, model_entrypoint
from torch import Tensor, nn

from uvc.io.checkpoint_files import Found, named, read_weights
from uvc.io.finite import first_not_finite
from uvc.io.weight_names import bare, to_timm, without_wrappers
from uvc.layers import blocks_of, cfg_of, is_compacted
from uvc.structure import Structure, structure_of

# First parts of names that belong to no vision transformer without its classifier: other heads, decoders.
# fmt: off
OTHER_PARTS = {
    "head", "head_dist", "heads", "fc", "classifier", "cls_classifier", "distillation_classifier", "pooler",
    "pre_logits", "mask_token", "decoder", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred",
    "decoder_pos_embed", "dino_head", "ibot_head", "projector", "predictor", "student",
}
# fmt: on


def load_weights(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Load trained weights into a timm, converted or compacted model, in its dtype.

    Wrappers such as {"model": ...} and prefixes such as `module.` are taken off; names of transformers' ViT,
    DeiT and DINOv2 and of torchvision become timm's; timm's own `checkpoint_filter_fn` does the rest and
    resamples position embeddings and patches to the size of the model.

    Args:
        path: a safetensors file, a file of `torch.save` (read with weights_only=True), or a folder of
            `uvc.save`, timm's hub or transformers that holds one.

    Returns:
        Names of the parameters that stay as they were: those of a classifier that the file does not have, or
        has for other classes. One warning says this and whatever else was changed or left out.

    Raises:
        ValueError: one line with the path, what is wrong and what to do; nothing is loaded then.
    """
    fitted = take_weights(model, Path(path))
    warn(fitted, path)
    return fitted.left


def take_weights(model: nn.Module, path: Path) -> Fitted:
    """As `load_weights`, without the warning."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    found = read_weights(path)
    try:
        check_beside(found.config, model)
        fitted = fit(found, model)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    # What has no memory of its own takes the tensors: not views of a file that may go.
    meta = any(tensor.is_meta for tensor in model.state_dict().values())
    tensors = {name: t.clone() for name, t in fitted.tensors.items()} if meta else fitted.tensors
    model.load_state_dict(tensors, strict=False, assign=meta)
    return fitted


def warn(fitted: Fitted, path: str | Path) -> None:
    """Say once what was changed or left out."""
    if fitted.notes:
        warnings.warn(f"{str(path)!r}: {'; '.join(fitted.notes)}", stacklevel=3)


class Fitted(NamedTuple):
    """What a model can load: tensors, names of the parameters left alone, what the user should know, and the
    names of the classes where a folder of `uvc.save` has them.
    """

    tensors: dict[str, Tensor]
    left: tuple[str, ...]
    notes: list[str]
    classes: tuple[str, ...] | None


class Match(NamedTuple):
    """How far weights are those that a model expects; lists of names."""

    tensors: dict[str, Tensor]
    left: list[str]
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def faults(self) -> int:
        """How many tensors are wrong."""
        return len(self.missing) + len(self.unexpected) + len(self.shapes)


def fit(found: Found, model: nn.Module) -> Fitted:
    """The weights as `model` takes them; ValueError unless all fit, the classifier aside."""
    expected, plain = model.state_dict(), without_wrappers(found.tensors)
    best, given = None, plain
    # As they are first: timm's own filter knows more files than are renamed here.
    for rename in (lambda: plain, lambda: to_timm(plain, expected)):
        names = rename()
        now = match(adapted(names, model, found.config), expected, classifiers(model))
        if best is None or now.faults < best.faults:
            best, given = now, names
        if not best.faults:
            break
    if best.faults:
        raise ValueError(f"{told(best)}; give weights of this very model, or make the model they are of")
    if lost := [name for name in best.left if expected[name].is_meta]:
        raise ValueError(f"lacks {named(lost)}, and a model on the meta device has no values of its own")
    tensors = {name: as_dtype(name, t, expected[name].dtype) for name, t in best.tensors.items()}
    if (name := first_not_finite(tensors)) is not None:
        kind = str(tensors[name].dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} holds values that are NaN or infinite in {kind}; take weights from before that happened"
        )
    notes = [*found.notes, *changes(given, best, expected)]
    names = (found.config.get("preprocessing") or {}).get("label_names") if is_ours(found.config) else None
    return Fitted(tensors, tuple(best.left), notes, tuple(names) if names and not best.left else None)


def match(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], heads: tuple[str, ...]) -> Match:
    """How far `weights` are those of a model that expects others; classifiers that differ are left."""
    left: list[str] = []
    for head in heads:
        mine = [name for name in expected if name.startswith(head)]
        there = [name for name in mine if name in weights]
        if not there or any(weights[name].shape != expected[name].shape for name in there):
            left += mine
    tensors = {name: weights[name] for name in expected if name in weights and name not in left}
    return Match(
        tensors,
        left,
        missing=[name for name in expected if name not in weights and name not in left],
        unexpected=[name for name in weights if name not in expected and not is_other(name)],
        shapes=[
            f"{name} {list(t.shape)} for {list(expected[name].shape)}"
            for name, t in tensors.items()
            if t.shape != expected[name].shape
        ],
    )


def is_other(name: str) -> bool:
    """Whether a weight belongs to no vision transformer without its classifier."""
    return bool({name.partition(".")[0], bare(name).partition(".")[0]} & OTHER_PARTS)


def adapted(weights: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights after timm's own filter for the model, the first layer as for its number of channels."""
    weights = dict(weights)
    # A layer before the classifier that timm's models no longer have; without it the classifier is another.
    if any("pre_logits" in name for name in weights):
        weights = {name: t for name, t in weights.items() if not name.startswith("head.")}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if (
        is_ours(config)
        and size is not None
        and tuple(config["arguments"].get("img_size") or ()) == tuple(size)
    ):
        return weights  # timm would take its grid for one of the size that the model was published with
    try:
        found = dict(filter_of(model)(dict(weights), model))
    except Exception:  # filters run into whatever they do not expect; names and shapes tell what that is
        return weights
    first, expected = cfg_of(model).get("first_conv") or (), model.state_dict()
    for name in [f"{layer}.weight" for layer in ([first] if isinstance(first, str) else first)]:
        mine, its = expected.get(name), found.get(name)
        if mine is None or its is None or not its.ndim == mine.ndim == 4:
            continue
        if its.shape[1] == 3 != mine.shape[1]:
            found[name] = adapt_input_conv(mine.shape[1], its)
    return found


def filter_of(model: nn.Module) -> Callable[[dict[str, Any], nn.Module], Mapping[str, Tensor]]:
    """timm's `checkpoint_filter_fn` for a model, with the options that timm gives it; or none at all."""
    name = cfg_of(model).get("architecture") or ""
    modules = [model_entrypoint(name).__module__] if is_model(name) else []
    modules += [cls.__module__ for cls in type(model).__mro__]
    found = (getattr(sys.modules.get(module), "checkpoint_filter_fn", None) for module in modules)
    function = next((f for f in found if f is not None), None)
    if function is None:
        return lambda weights, model: weights
    known, options = inspect.signature(function).parameters, {"adapt_layer_scale": True}
    if "flexi" in name or "radio" in name:
        options |= {"interpolation": "bilinear", "antialias": False}
    return partial(function, **{key: value for key, value in options.items() if key in known})


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Starts of the names of a model's classifiers, as timm has them."""
    names = cfg_of(model).get("classifier") or ("head", "head_dist")
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def as_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the model's dtype; ValueError for integers in place of numbers."""
    if tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex():
        its, mine = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
        raise ValueError(f"{name} is {its} where the model has {mine}; save the weights as {mine}")
    return tensor.to(dtype)


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether `uvc.save` wrote a config."""
    return str(config.get("format")).startswith("uvc-")


def check_beside(config: Mapping[str, Any], model: nn.Module) -> None:
    """ValueError where config.json beside the weights says what their shapes do not, and the model differs:
    the number of heads, and what is kept.
    """
    blocks = blocks_of(model) or [None]
    mine = getattr(getattr(blocks[0], "attn", None), "num_heads", None)
    its = config["arguments"].get("num_heads") if is_ours(config) else config.get("num_attention_heads")
    if isinstance(its, int) and mine is not None and its != mine and not is_compacted(model):
        raise ValueError(
            f"it has {its} heads per block, the model {mine}; make the model with num_heads={its}"
        )
    if not is_ours(config) or config["arguments"].get("embed_dim") != getattr(model, "embed_dim", None):
        return
    saved = Structure.from_data(config["structure"])
    if len(saved.blocks) == len(blocks) and saved != structure_of(model):
        raise ValueError(
            "it is a pruned model, or one of other sizes, which weights alone do not make; use uvc.load, "
            "which gives it whole"
        )


def told(best: Match) -> str:
    """What is wrong with weights, in words."""
    said = {
        "lacks {} of the model's tensors": best.missing,
        "has {} that the model does not know": best.unexpected,
        "has {} of other shapes": best.shapes,
    }
    return "; ".join(words.format(named(names)) for words, names in said.items() if names)


def changes(given: Mapping[str, Tensor], best: Match, expected: Mapping[str, Tensor]) -> list[str]:
    """What was left, changed or not used, for the user to know."""
    notes = []
    if best.left:
        sizes = [f"{list(given[n].shape)}, not {list(expected[n].shape)}" for n in best.left if n in given]
        why = f"the file has {sizes[0]}" if sizes else "the file has none"
        notes.append(f"{', '.join(best.left)} stay as they were: {why}")
    resampled = [
        f"{name} {list(given[name].shape)} to {list(tensor.shape)}"
        for name, tensor in best.tensors.items()
        if name in given and tensor is not given[name] and not _without_class(name, given, tensor)
    ]
    if resampled:
        notes.append(f"adapted by timm: {', '.join(resampled)}")
    if unused := [
        name for name in given if name not in best.tensors and name not in best.left and is_other(name)
    ]:
        notes.append(f"not used: {named(unused)}")
    return notes


def _without_class(name: str, given: Mapping[str, Tensor], tensor: Tensor) -> bool:
    """Whether timm has but added the class token's position to it, as of DINOv2."""
    moved = "register_tokens" in given and name in ("cls_token", "pos_embed")
    return moved and tensor.shape[1] in (1, given[name].shape[1] - 1)

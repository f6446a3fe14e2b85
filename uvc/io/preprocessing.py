"""What a model expects of its images, and what its classes are called: part of a saved model, as plain data.

In memory it stands where timm looks for it, in the dict `model.pretrained_cfg`.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from uvc.layers import cfg_of, image_of

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "hamming", "box", "random")
CROP_MODES = ("center", "squash", "border")
LONGEST_NAME = 1000


def preprocessing_of(model: nn.Module) -> dict[str, Any] | None:
    """What `pretrained_cfg` of a timm model says of images and classes, with the model's own input size.

    None when it says nothing. ValueError, naming the field, for values that timm could not use. Names of
    classes that are not as many as the model's are those of another head: left out, with a warning.
    """
    given = cfg_of(model)
    found = {name: given[name] for name in CHECKS if given.get(name) is not None}
    if not found:
        return None
    if (size := image_of(model)) is not None:
        found["input_size"] = size
    names = found.get("label_names")
    if isinstance(names, Sequence) and not isinstance(names, str) and len(names) != model.num_classes:
        warnings.warn(
            f"pretrained_cfg: label_names are {len(names)}, the model has {model.num_classes} classes; they "
            "are not saved",
            stacklevel=4,
        )
        del found["label_names"]
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    try:
        check_preprocessing(found, model)
    except ValueError as error:
        raise ValueError(f"cannot save: pretrained_cfg: {error}") from None
    return found


def check_preprocessing(found: object, model: nn.Module) -> None:
    """ValueError, naming the field, unless `found` is what `preprocessing_of` gives of a model like this."""
    if not isinstance(found, dict) or not found.keys() <= CHECKS.keys():
        raise ValueError(f"preprocessing must be an object with fields among {', '.join(CHECKS)}")
    for name, value in found.items():
        fits, wanted = CHECKS[name]
        if not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r:.60}")
    if len(found.get("label_names", ())) not in (0, model.num_classes):
        raise ValueError(f"label_names are {len(found['label_names'])} for {model.num_classes} classes")


def take_preprocessing(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Let `model` expect this of its images and call its classes so."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    model.pretrained_cfg = model.default_cfg = {**cfg_of(model), **given}


def note_data(model: nn.Module, view: Mapping[str, Any] | None, classes: Sequence[str] | None) -> None:
    """Note in `model` how the images it is trained on were prepared, and what its classes are called."""
    names = {} if classes is None else {"label_names": tuple(classes)}
    view = {name: value for name, value in (view or {}).items() if name in CHECKS}
    take_preprocessing(model, {**view, **names})


def check_classes(model: nn.Module, classes: Sequence[str] | None) -> None:
    """ValueError, naming the first difference, unless data with these classes mean what `model` answers."""
    check_names(cfg_of(model).get("label_names"), classes, "the model")


def check_names(names: Sequence[str] | None, classes: Sequence[str] | None, where: str) -> None:
    """ValueError, naming the first difference, unless the names of classes `where` are those of data."""
    for i, (mine, theirs) in enumerate(zip(names or (), classes or (), strict=False)):
        if mine != theirs:
            raise ValueError(
                f"--data: class {i} is {theirs!r} there but {mine!r} in {where}; give data with its classes"
            )


def _number(value: object, least: float = -math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > least


def _numbers(value: object, least: float = -math.inf) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 64 and all(_number(v, least) for v in value)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and v > 0 for v in value)


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and len(v) <= LONGEST_NAME for v in value)


# Field of timm's pretrained_cfg -> what its value in JSON must be, in code and in words.
CHECKS = {
    "input_size": (_sizes, "[channels, height, width]"),
    "interpolation": (lambda v: v in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_pct": (lambda v: _number(v, 0), "a number above 0"),
    "crop_mode": (lambda v: v in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
    "mean": (_numbers, "a list of numbers, one per channel"),
    "std": (lambda v: _numbers(v, 0), "a list of numbers above 0, one per channel"),
    "label_names": (_names, "a list of strings"),
    "license": (lambda v: isinstance(v, str) and 0 < len(v) <= 100, "a short text"),
}

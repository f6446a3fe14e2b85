"""What a run starts from: its data, and its model with the weights that its teacher has."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from uvc.config import RunConfig
from uvc.io.files import one_line
from uvc.io.finite import refuse_not_finite
from uvc.io.preprocessing import check_names
from uvc.io.serialization import CONFIG as MODEL
from uvc.io.weights import take_weights, warn
from uvc.layers import cfg_of, image_of, set_image, set_tokens, takes_any_size
from uvc.training.data import Data, load_data

TEACHER = "teacher"  # folder in the folder of a run


def open_data(run: RunConfig, model_input: Mapping[str, Any]) -> Data:
    """The data of a run, prepared as timm's `pretrained_cfg` says that its model takes images."""
    return load_data(
        run.data,
        model_input=model_input,
        batch_size=run.training.batch_size,
        seed=run.seed,
        workers=run.workers,
        root=run.data_root,
        views=run.images,
    )


def begin(run: RunConfig, data: Data, out: Path) -> tuple[nn.Module, bool]:
    """The model with its teacher's weights, as far as there are any, and whether they need no training.

    A teacher that this run had trained before it was interrupted comes first.
    """
    model = model_of(run, data.num_classes)
    if (out / TEACHER / MODEL).is_file():  # which is written last
        take_weights(model, out / TEACHER)
        return model, True
    if run.pretrained:
        return _pretrained(model, run, data)
    if run.teacher is None:
        return model, False
    try:
        found = take_weights(model, Path(run.teacher))
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from None
    if found.left:
        _check_time(run, f"--teacher: {run.teacher!r} has no {found.left[0]} for {data.num_classes} classes")
    check_names(found.classes, data.classes, "the teacher")
    warn(found, run.teacher)
    return model, not found.left


def model_of(run: RunConfig, num_classes: int, pretrained: bool = False) -> nn.Module:
    """The timm model of a run; ValueError for arguments that it does not take."""
    arguments, size = dict(run.model_args), run.images.input_size
    if "num_classes" in arguments:
        raise ValueError("--model-arg: num_classes comes from the data; leave it out")
    if size is not None:
        if _input_size(size, arguments) != size:
            raise ValueError(f"--input-size: {size}, but --model-arg says otherwise; leave one of them out")
        arguments |= {"in_chans": size[0], "img_size": size[1:]}
    make = partial(timm.create_model, run.model, pretrained=pretrained, num_classes=num_classes)
    if pretrained or not arguments:
        return _sized(_made(make, arguments, size), run)
    try:
        model = _made(make, arguments, size)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model-arg: {run.model} cannot be made with {arguments}: {one_line(error)}"
        ) from None
    return _sized(model, run)


def model_input(run: RunConfig) -> dict[str, Any]:
    """What the model of a run takes, as timm's `pretrained_cfg` has it."""
    found = timm.get_pretrained_cfg(run.model)
    wants = found.to_dict() if found is not None else {"input_size": (3, 224, 224)}
    if run.images.tokens_per_image is not None:
        with torch.device("meta"):
            return {**wants, "input_size": image_of(model_of(run, 1))}
    return {**wants, "input_size": _input_size(wants["input_size"], run.model_args)}


def _made(
    make: Callable[..., nn.Module], arguments: dict[str, Any], size: tuple[int, int, int] | None
) -> nn.Module:
    """A model of these arguments; one for images of any size may take no size when it is made."""
    try:
        return make(**arguments)
    except TypeError as error:
        if size is None or "img_size" not in str(error):
            raise
        model = make(**{name: value for name, value in arguments.items() if name != "img_size"})
        if not takes_any_size(model):
            raise
        return model


def _sized(model: nn.Module, run: RunConfig) -> nn.Module:
    """A model that takes images of any size with the size of a run's images; another as it is."""
    tokens, size = run.images.tokens_per_image, run.images.input_size
    if tokens is not None and size is not None:
        raise ValueError("--tokens-per-image: --input-size says how many there are; leave one of them out")
    if tokens is not None:
        return set_tokens(model, tokens)
    if not takes_any_size(model):
        return model
    return set_image(model, _input_size(image_of(model), run.model_args) if size is None else size)


def _input_size(size: tuple[int, int, int], args: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of a model made with these arguments."""
    images = args.get("img_size", size[1:])
    height, width = images if isinstance(images, tuple) else (images, images)
    return (args.get("in_chans", size[0]), height, width)


def _pretrained(model: nn.Module, run: RunConfig, data: Data) -> tuple[nn.Module, bool]:
    """`_begin` with the weights that timm has of `model`."""
    classes = cfg_of(model).get("num_classes")
    if classes != data.num_classes:
        _check_time(run, f"--pretrained: {run.model} is for {classes} classes, not {data.num_classes}")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # each try to reach it would be a line
    try:
        model = model_of(run, data.num_classes, pretrained=True)
    except Exception as error:  # clients of hubs fail as the network does, in many ways
        raise ValueError(
            f"--pretrained: no weights of {run.model} can be had ({one_line(error):.200}); give a file of "
            "weights, --teacher FILE"
        ) from None
    finally:
        hub.setLevel(level)
    refuse_not_finite(model.state_dict(), f"--pretrained: {run.model}")
    return model, classes == data.num_classes


def _check_time(run: RunConfig, why: str) -> None:
    """ValueError when the classifier is new and no epochs would train it."""
    if not run.training.teacher_epochs:
        raise ValueError(
            f"{why}, and with --teacher-epochs 0 its classifier is not trained; give epochs, or weights with "
            "these classes"
        )

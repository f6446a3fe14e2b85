"""`uvc eval`: the model in a folder, judged on the data of its run or on others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uvc.app.resolve import stored_run
from uvc.app.run_dir import OPTIONS
from uvc.app.start import model_input, open_data
from uvc.config import DataConfig, RunConfig
from uvc.costs import cost
from uvc.environment import choose_device
from uvc.io.dtypes import check_runs
from uvc.io.preprocessing import check_classes
from uvc.io.serialization import load
from uvc.layers import cfg_of, image_of
from uvc.recipes import RECIPES
from uvc.training.data import Data
from uvc.training.evaluation import count_right


def evaluate_run(
    folder: Path,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    budget: float | None = None,
) -> dict[str, Any]:
    """Top-1 accuracy, images, MACs and parameters of the model that `uvc.save` left in a folder.

    What is None is as in the run that made the folder, the device aside, which is the CPU, and the budget:
    of several the largest.
    """
    model = load(folder, budget=budget)
    opened, name, place = data_of(folder, model, data, data_root, device, threads, batch_size, workers)
    check_runs(model)
    figures = cost(model)
    right, images = count_right(model.to(place), opened.val, place)
    return {
        "top1": 100.0 * right / images,
        "images": images,
        "data": name,
        "macs": figures.macs,
        "params": figures.params,
    }


def data_of(
    folder: Path,
    model: nn.Module,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> tuple[Data, str, torch.device]:
    """The data of the run in a folder, or others, as its model takes them, their name, and the device."""
    run, wants = RunConfig(training=RECIPES["digits"]()), {}
    if (folder / OPTIONS).is_file():
        run = stored_run(folder)
        wants = model_input(run)
    if data is not None and data != run.data:
        training = RECIPES.get(data, RECIPES["default"])()
        run = replace(run, data=data, data_root=None, images=DataConfig(), training=training)
    changes = {"data_root": data_root, "workers": workers}
    run = replace(run, **{name: value for name, value in changes.items() if value is not None})
    changes = {"batch_size": batch_size, "threads": threads}
    training = replace(run.training, **{k: v for k, v in changes.items() if v is not None})
    place = choose_device(device, training.threads)
    wants = cfg_of(model) or wants
    wants["input_size"] = image_of(model)
    opened = open_data(replace(run, training=training), wants)
    if opened.num_classes != model.num_classes:
        raise ValueError(
            f"--data: {run.data!r} has {opened.num_classes} classes, the model has {model.num_classes}"
        )
    check_classes(model, opened.classes)
    return opened, run.data, place

"""Data: one call gives a train and an evaluation loader, from handwritten digits, image folders, or data sets
that timm names.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from uvc.config import DataConfig
from uvc.training.folders import USAGE, open_folder
from uvc.training.loaders import ImageLoader, Loader, TensorLoader
from uvc.training.shards import ShardReader

DIGITS = "digits"
# The model that fits a data set when none is named.
DEFAULT_MODELS = {DIGITS: "uvc_vit_digits"}
# Mean and deviation of the 1297 training images, pixels in [0, 1].
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376
# What timm.data.create_dataset knows and can be read in random order.
TIMM_PREFIXES = ("torch/", "hfds/", "wds/")
# torchvision's folders, which are ours: theirs clip 16-bit images and skip files without a word.
FOLDER_NAMES = ("torch/image_folder", "torch/folder")
# What timm's readers answer names and folders with that they cannot open.
FAULTS = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)
VALIDATION = ("validation", "val", "valid", "test")


class Data(NamedTuple):
    """What `load_data` returns; `input_size` is (C, H, W) of the images that the loaders yield."""

    train: Loader
    val: Loader
    num_classes: int
    input_size: tuple[int, int, int]
    name: str
    classes: tuple[str, ...] | None = (
        None  # their names in the order of their labels, where the data have any
    )
    # How images are cropped and normalised, as timm's `pretrained_cfg` names it.
    view: Mapping[str, Any] | None = None


def check_name(name: str) -> None:
    """ValueError unless `load_data` knows a data set or a folder of this name."""
    if name != DIGITS and not Path(name).is_dir() and not name.startswith(TIMM_PREFIXES):
        raise ValueError(f"data: {name!r} is no known data set and no folder; {USAGE}")


def load_data(
    name_or_path: str | Path,
    *,
    model_input: tuple[int, int, int] | Mapping[str, Any],
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    validation: str = "test",
    root: str | Path | None = None,
    views: DataConfig | None = None,
) -> Data:
    """Load `digits`, an image folder, or a data set that `timm.data.create_dataset` names.

    Args:
        model_input: (C, H, W) that the model wants, or timm's `pretrained_cfg` of it as a mapping, which also
            says how photographs are cropped and normalised.
        batch_size: images per batch, training and evaluation.
        seed: of the order and of the augmentation.
        workers: processes that read images; digits needs none.
        validation: 'test' evaluates on the 500 test digits; 'val' never touches them: it trains on 1000 of
            the other 1297 and evaluates on their remaining 297, for choosing settings.
        root: where a data set that timm names is stored.
        views: what the user asks of the images, over what the model says; not for digits, which come ready.

    Files that are not used and images that cannot be read are counted and named once, by a warning.

    Raises:
        ValueError: an unknown or incomplete data set, or an argument out of range.
    """
    config = dict(model_input) if isinstance(model_input, Mapping) else {"input_size": tuple(model_input)}
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; it must be at least 1")
    if workers < 0:
        raise ValueError(f"workers: {workers}; it must be 0 or more")
    if validation not in ("test", "val"):
        raise ValueError(f"validation: {validation!r}; use 'test' or 'val'")
    views = views or DataConfig()
    if str(name_or_path) == DIGITS:
        if views != DataConfig():
            given = next(f.name for f in dataclasses.fields(views) if getattr(views, f.name) != f.default)
            raise ValueError(f"{given}: {getattr(views, given)!r} is for photographs; digits come ready")
        return _load_digits(config["input_size"], batch_size, seed, validation)
    if validation == "val":
        raise ValueError(f"validation: 'val' holds out a part of digits only, not of {str(name_or_path)!r}")
    name = str(name_or_path)
    check_name(name)
    if Path(name).is_dir() or name in FOLDER_NAMES:
        folder = Path(name) if Path(name).is_dir() else _root(name, root)
        train, val = open_folder(folder)
        for reader in (train, val):
            if reader.unused.found:
                warnings.warn(f"{reader.root}: not used are {reader.unused}", stacklevel=2)
    else:
        train, val = _open_named(name, root)
    return _image_data(name, train, val, _view(config, views), views, batch_size, seed, workers)


def _load_digits(input_size: tuple[int, int, int], batch_size: int, seed: int, validation: str) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(range(1797), test_size=500, stratify=digits.target, random_state=0)
    if validation == "val":
        train, val = train_test_split(train, test_size=297, stratify=digits.target[train], random_state=0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]  # [1797, 1, 8, 8], 0 to 16
    images = (images / 16 - DIGITS_MEAN) / DIGITS_STD
    labels = torch.tensor(digits.target, dtype=torch.int64)
    size = tuple(input_size)
    fill = -DIGITS_MEAN / DIGITS_STD
    return Data(
        TensorLoader(
            images[train],
            labels[train],
            batch_size,
            training=True,
            seed=seed,
            warp=1.0,
            noise=0.1,
            fill=fill,
            size=size,
        ),
        TensorLoader(images[val], labels[val], batch_size, size=size),
        num_classes=10,
        input_size=size,
        name=DIGITS,
        classes=tuple("0123456789"),
        view={
            "input_size": size,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (DIGITS_MEAN,) * size[0],
            "std": (DIGITS_STD,) * size[0],
        },
    )


def _root(name: str, root: str | Path | None) -> Path:
    if root is None or not Path(root).is_dir():
        where = "no data root is given" if root is None else f"{str(root)!r} is no folder"
        raise ValueError(f"data: {name!r} needs --data-root, the folder it is stored in; {where}")
    return Path(root)


def _open_named(name: str, root: str | Path | None) -> tuple[Any, Any]:
    """Readers of the splits of a data set that timm names."""
    train = _open_split(name, root, ("train",))
    return train, _open_split(name, root, VALIDATION)


def _open_split(name: str, root: str | Path | None, splits: tuple[str, ...]) -> Any:
    """A reader of the first of the splits that is there."""
    from timm.data import create_dataset

    if name.startswith("wds/"):
        _root(name, root)
    where = f"in {str(root)!r}" if root else "(no data root given)"
    first = None
    for split in splits:
        try:
            found = create_dataset(name, root=None if root is None else str(root), split=split)
            # Readers give the file, so that it is decoded here; what else there is gives images.
            reader = getattr(found, "reader", found)
            return ShardReader(reader) if name.startswith("wds/") else reader
        except ImportError as error:
            raise ValueError(f"data: {name!r} needs a package that is not installed: {error}") from error
        except FAULTS as error:
            first = first or error
    said = " ".join(str(first).split()) or type(first).__name__
    raise ValueError(f"data: timm cannot open {name!r} {where}: {said}") from first


def _view(config: Mapping[str, Any], views: DataConfig) -> dict[str, Any]:
    """How images are cropped and normalised: as the model says, but for what the user asks."""
    from timm.data import resolve_data_config

    size = tuple(views.input_size or config["input_size"])
    if len(size) != 3 or size[0] not in (1, 3) or min(size) < 1:
        raise ValueError(f"input_size: {size}; give (channels, height, width), of 1 or 3 channels")
    asked = {"input_size": size, "crop_pct": views.crop_pct, "interpolation": views.interpolation}
    for name in ("mean", "std"):
        own = config.get(name) or ((0.5,) if size[0] == 1 else None)
        if size[0] == 1 and own:
            own = (sum(own) / len(own),)  # what colours have, grey has about the mean of
        values = getattr(views, name) or own
        if values and len(values) not in (1, size[0]):
            raise ValueError(f"{name}: {values} are {len(values)} numbers; images have {size[0]} channels")
        asked[name] = values
    known = ("bilinear", "bicubic", "nearest", "lanczos", "hamming", "box", "random")
    if views.interpolation not in (None, *known):
        raise ValueError(f"interpolation: {views.interpolation!r}; use one of {', '.join(known)}")
    return resolve_data_config(asked, pretrained_cfg=dict(config))


def _numbered(reader: Any) -> dict[str, int]:
    """The names of the classes and their labels, as far as the data say them."""
    names = getattr(reader, "class_to_idx", None)
    return names or {name: i for i, name in enumerate(getattr(reader, "classes", ()))}


def _image_data(
    name: str,
    train: Any,
    val: Any,
    view: dict[str, Any],
    views: DataConfig,
    batch_size: int,
    seed: int,
    workers: int,
) -> Data:
    from timm.data import create_transform

    names = _numbered(train)
    if not names:
        raise ValueError(f"data: {name!r} does not say how many classes it has; use an image folder")
    if len(names) < 2:
        raise ValueError(
            f"data: {name!r} has one class, {next(iter(names))!r}; there is nothing to tell apart"
        )
    if not isinstance(val, ShardReader) and names != _numbered(val):
        raise ValueError(f"data: {name!r}: the splits differ in their classes; give both the same ones")
    if not 0 < views.scale[0] <= views.scale[-1] <= 1 or len(views.scale) != 2:
        raise ValueError(f"scale: {views.scale}; it is two shares of an image, the smaller first, as 0.08, 1")
    try:
        changed = create_transform(
            **view,
            is_training=True,
            color_jitter=views.color_jitter,
            scale=views.scale,
            auto_augment=views.aa,
            re_prob=views.reprob,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"aa: {views.aa!r} is no policy of timm ({error}); try rand-m9-mstd0.5") from None
    if workers > (processors := len(os.sched_getaffinity(0))):
        warnings.warn(
            f"workers: {workers} processes will read images, but this run may use {processors} "
            f"processor{'' if processors == 1 else 's'}; "
            f"--workers {processors} is likely to be faster",
            stacklevel=2,
        )
    common = dict(mode="L" if view["input_size"][0] == 1 else "RGB", seed=seed, workers=workers)
    return Data(
        ImageLoader(train, changed, batch_size, training=True, split="train", **common),
        ImageLoader(val, create_transform(**view), batch_size, split="val", **common),
        num_classes=max(names.values()) + 1,
        input_size=view["input_size"],
        name=name,
        classes=tuple(str(label) for label in sorted(names, key=names.get)),
        view=view,
    )

"""Data: one call gives a train and an evaluation loader of (images float32 [B, C, H, W], labels int64 [B]).

A loader's random choices depend on its seed, its epoch and the image's place in that epoch only.
`state_dict()` names the next batch as two integers, so a resumed run sees the batches it would have seen.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = "digits"
# The model that fits a data set when none is named.
DEFAULT_MODELS = {DIGITS: "uvc_vit_digits"}
# Mean and deviation of the 1297 training images, pixels in [0, 1].
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376
# What timm.data.create_dataset knows and can read in random order.
TIMM_PREFIXES = ("torch/", "hfds/")
USAGE = (
    "use 'digits', a folder with train/ and val/ full of class folders, or a timm name such as torch/cifar10"
)


class Data(NamedTuple):
    """What `load_data` returns; `input_size` is (C, H, W) of the images that the loaders yield."""

    train: "Loader"
    val: "Loader"
    num_classes: int
    input_size: tuple[int, int, int]
    name: str


class Loader(ABC):
    """Counts epochs and batches; subclasses say how many batches there are and yield those of one epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch = 0
        self._batch = 0
        self._resume_at = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch."""

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start` and following of an epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._batch and not self._resume_at:
            # The last epoch was left in the middle: the next one is a new one.
            self._epoch += 1
        epoch, self._batch, self._resume_at = self._epoch, self._resume_at, 0
        for images, labels in self._batches(epoch, self._batch):
            # Counted before it is handed over: a checkpoint that its receiver writes names the next one.
            self._batch += 1
            if self._batch == len(self):
                self._epoch, self._batch = epoch + 1, 0
            yield images, labels

    def state_dict(self) -> dict[str, int]:
        """The next batch, as its epoch and its place in that epoch."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the batch that `state_dict` named."""
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._resume_at = self._batch


def _generator(seed: int, epoch: int) -> torch.Generator:
    # A large odd factor keeps the streams of neighbouring seeds apart for any number of epochs.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))


def _batch_count(images: int, batch_size: int, training: bool) -> int:
    # Training drops the last short batch: the order is random, so no image is lost for long.
    return max(1, images // batch_size) if training else -(-images // batch_size)


class TensorLoader(Loader):
    """Images that lie in memory, float32 [n, C, H, W], already normalised; labels int64 [n].

    With `training` every epoch is reshuffled, and each image goes through a random affine map and gets normal
    noise of deviation `noise`. `warp` 1 means up to 10 degrees, 10% of scale and shear, and 1/16 of the image
    of shift; `fill` moves in. `size` (C, H, W) resizes each batch bilinearly and repeats its channel.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        training: bool = False,
        seed: int = 0,
        warp: float = 0.0,
        noise: float = 0.0,
        fill: float = 0.0,
        size: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(seed)
        self.images, self.labels, self.batch_size, self.training = images, labels, batch_size, training
        self.warp, self.noise, self.fill = warp, noise, fill
        self.size = size or tuple(images.shape[1:])

    def __len__(self) -> int:
        return _batch_count(len(self.labels), self.batch_size, self.training)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images, self.labels
        if self.training:
            # One vectorised draw for the whole epoch: a batch then is a slice.
            generator = _generator(self.seed, epoch)
            order = torch.randperm(len(labels), generator=generator)
            images, labels = self._augment(images[order], generator), labels[order]
        for batch in range(start, len(self)):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield self._resize(images[rows]), labels[rows]

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.warp:
            # Bilinear, zeros outside: `fill` is made zero for the while.
            maps = F.affine_grid(self._maps(len(images), generator), list(images.shape), align_corners=False)
            images = F.grid_sample(images - self.fill, maps, align_corners=False) + self.fill
        if self.noise:
            images = images + self.noise * torch.randn(images.shape, generator=generator)
        return images

    def _maps(self, count: int, generator: torch.Generator) -> Tensor:
        """Random affine maps [count, 2, 3] in `affine_grid` coordinates: the image spans [-1, 1]."""
        angle, shear, *rest = ((torch.rand(6, count, generator=generator) * 2 - 1) * self.warp).unbind(0)
        angle, shear = angle * math.radians(10), shear * 0.1
        scale_x, scale_y, shift_x, shift_y = 1 + rest[0] * 0.1, 1 + rest[1] * 0.1, rest[2] / 8, rest[3] / 8
        rows = [
            angle.cos() * scale_x,
            shear - angle.sin(),
            shift_x,
            angle.sin(),
            angle.cos() * scale_y,
            shift_y,
        ]
        return torch.stack(rows, 1).view(count, 2, 3)

    def _resize(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != self.size[1:]:
            images = F.interpolate(images, self.size[1:], mode="bilinear", align_corners=False)
        if images.shape[1] != self.size[0]:
            images = images.expand(-1, self.size[0], -1, -1)
        return images.contiguous()


class _Views(torch.utils.data.Dataset):
    """Transformed images; a view depends on (seed, epoch, index), not on workers or global state."""

    def __init__(self, images: Sequence, transform: Any, mode: str, seed: int, epoch: int) -> None:
        self.images, self.transform, self.mode, self.seed, self.epoch = images, transform, mode, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):
            seed = hash((self.seed, self.epoch, index))
            random.seed(seed)
            torch.manual_seed(seed)
            view = self.transform(image.convert(self.mode))
        random.setstate(before)
        return view, label


class ImageLoader(Loader):
    """Images that are read and transformed on the way, by `workers` processes (0: by this one)."""

    def __init__(
        self,
        images: Sequence,
        transform: Any,
        batch_size: int,
        *,
        mode: str = "RGB",
        training: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(seed)
        self.images, self.transform, self.mode = images, transform, mode
        self.batch_size, self.training, self.workers = batch_size, training, workers

    def __len__(self) -> int:
        return _batch_count(len(self.images), self.batch_size, self.training)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.images))
        if self.training:
            order = torch.randperm(len(order), generator=_generator(self.seed, epoch))
        batches = order.split(self.batch_size)[start : len(self)]
        yield from torch.utils.data.DataLoader(
            # Evaluation always sees the same view, whatever the epoch.
            _Views(self.images, self.transform, self.mode, self.seed, epoch if self.training else 0),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            generator=_generator(self.seed, epoch),
        )


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
    if str(name_or_path) == DIGITS:
        return _load_digits(config["input_size"], batch_size, seed, validation)
    if validation == "val":
        raise ValueError(f"validation: 'val' holds out a part of digits only, not of {str(name_or_path)!r}")
    name = str(name_or_path)
    check_name(name)
    train, val, num_classes = _open_folder(Path(name)) if Path(name).is_dir() else _open_named(name, root)
    return _image_data(name, train, val, num_classes, config, batch_size, seed, workers)


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
    )


def _open_folder(folder: Path) -> tuple[Sequence, Sequence, int]:
    from timm.data import create_dataset

    train_folder, val_folder = _split_folder(folder, "train"), _split_folder(folder, "val", "validation")
    classes = _classes(train_folder)
    if _classes(val_folder) != classes:
        raise ValueError(
            f"data: {str(folder)!r}: {train_folder.name}/ and {val_folder.name}/ differ in their classes"
        )
    index = {name: i for i, name in enumerate(classes)}
    train, val = (create_dataset("", root=str(part), class_map=index) for part in (train_folder, val_folder))
    return train, val, len(classes)


def _split_folder(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"data: {str(folder)!r} has no folder {' or '.join(names)}/; {USAGE}")


def _classes(folder: Path) -> list[str]:
    """Sorted names of the class folders, each checked to hold an image."""
    from timm.data import get_img_extensions

    endings = get_img_extensions(as_set=True)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"data: {str(folder)!r} holds no class folders; {USAGE}")
    for name in classes:
        if not any(file.suffix.lower() in endings for file in (folder / name).iterdir()):
            raise ValueError(f"data: class folder {str(folder / name)!r} holds no images; fill or remove it")
    return classes


def _open_named(name: str, root: str | Path | None) -> tuple[Sequence, Sequence, int]:
    from timm.data import create_dataset

    try:
        train = create_dataset(name, root=root, split="train")
        val = create_dataset(name, root=root, split="validation")
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        where = f"in {str(root)!r}" if root else "(no data root given)"
        raise ValueError(f"data: timm cannot open {name!r} {where}: {error}") from error
    classes = getattr(getattr(train, "reader", None), "class_to_idx", None) or getattr(train, "classes", None)
    if not classes:
        raise ValueError(f"data: {name!r} does not say how many classes it has; use an image folder")
    return train, val, len(classes)


def _image_data(
    name: str,
    train: Sequence,
    val: Sequence,
    num_classes: int,
    config: Mapping[str, Any],
    batch_size: int,
    seed: int,
    workers: int,
) -> Data:
    from timm.data import create_transform, resolve_data_config

    size = tuple(config["input_size"])
    if size[0] not in (1, 3):
        raise ValueError(f"model_input: {size}: images have 1 or 3 channels")
    if size[0] == 1:
        config = {"mean": (0.5,), "std": (0.5,), **config}
    mode = "L" if size[0] == 1 else "RGB"
    view = resolve_data_config(pretrained_cfg=config)
    common = dict(mode=mode, seed=seed, workers=workers)
    return Data(
        ImageLoader(train, create_transform(**view, is_training=True), batch_size, training=True, **common),
        ImageLoader(val, create_transform(**view), batch_size, **common),
        num_classes=num_classes,
        input_size=size,
        name=name,
    )

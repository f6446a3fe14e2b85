"""Loaders of (images float32 [B, C, H, W], labels int64 [B]).

A loader's random choices depend on its seed, its epoch and the image's place in that epoch only.
`state_dict()` names the next batch as two integers, so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uvc.training.images import Unreadable, read_picture
from uvc.training.shares import Share

# How many images in a row may be unreadable before training gives up on finding another one.
TRIES = 10
CANNOT_READ = "cannot be read"


class Shown(NamedTuple):
    """Which views a batch holds: views are a function of a loader's `identity`, epoch and index."""

    epoch: int
    batch: int
    indices: Tensor  # int64 [B], of the images


class Loader(ABC):
    """Counts epochs and batches; subclasses say how many batches there are and yield those of one epoch.

    `shown` tells of the batch that was yielded last, `identity` in JSON what else views depend on,
    `images_count` how many images there are.
    """

    identity: dict[str, Any]
    images_count: int
    batch_size: int  # of all processes together

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.own = Share()  # of each batch
        self.shown: Shown | None = None
        self._epoch = 0
        self._batch = 0
        self._resume_at = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch."""

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches `start` and following of an epoch: images, labels, and which images they are."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._batch and not self._resume_at:
            # The last epoch was left in the middle: the next one is a new one.
            self._epoch += 1
        epoch, self._batch, self._resume_at = self._epoch, self._resume_at, 0
        for images, labels, indices in self._batches(epoch, self._batch):
            self.shown = Shown(epoch, self._batch, indices)
            # Counted before it is handed over: a checkpoint that its receiver writes names the next one.
            self._batch += 1
            if self._batch == len(self):
                self._epoch, self._batch = epoch + 1, 0
            yield images, labels

    def take_share(self, rank: int, count: int) -> None:
        """From now on each batch has the rows of one of `count` processes alone."""
        self.own = Share(rank, count)

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
        self.images_count = len(images)

    @property
    def identity(self) -> dict[str, Any]:
        """The images themselves, by a digest, and how they are changed."""
        seen = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        seen.update(self.labels.contiguous().numpy().tobytes())
        own = {"warp": self.warp, "noise": self.noise, "fill": self.fill, "size": list(self.size)}
        return {"images": seen.hexdigest()[:32], "batch_size": self.batch_size, "seed": self.seed, **own}

    def __len__(self) -> int:
        return _batch_count(len(self.labels), self.batch_size, self.training)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        images, labels = self.images, self.labels
        order = torch.arange(len(labels))
        if self.training:
            # One vectorised draw for the whole epoch: a batch then is a slice.
            generator = _generator(self.seed, epoch)
            order = torch.randperm(len(labels), generator=generator)
            images, labels = self._augment(images[order], generator), labels[order]
        for batch in range(start, len(self)):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            mine = self.own.rows(len(order[rows]), self.training)
            if len(order[rows][mine]):
                yield self._resize(images[rows][mine]), labels[rows][mine], order[rows][mine]

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


class Remark(NamedTuple):
    """Something to be said about an image: which, what, and, for one that cannot be read, why."""

    index: int
    what: str
    why: str


class Views(torch.utils.data.Dataset):
    """Transformed images of a reader; a view depends on (seed, epoch, index), not on workers or global state.

    reader: as timm's are, `reader[index]` a file or an image and its label.
    """

    def __init__(self, reader: Any, transform: Callable, mode: str, seed: int, training: bool) -> None:
        self.reader, self.transform, self.mode = reader, transform, mode
        self.seed, self.training = seed, training

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor | None, int, list[Remark], int]:
        """The view of image `index` in `epoch`, its label, remarks, and the index. One that cannot be read is
        None, in training the view of the next one that can be.
        """
        epoch, index = place
        remarks = []
        for number in range(index, index + (TRIES if self.training else 1)):
            at = number % len(self.reader)
            try:
                picture, label = self._read(at)
            except Unreadable as error:
                remarks.append(Remark(at, CANNOT_READ, str(error)))
                continue
            if picture.remark:
                remarks.append(Remark(at, picture.remark, ""))
            with seeded(hash((self.seed, epoch, index))):
                return self.transform(picture.image), label, remarks, index
        return None, -1, remarks, index

    def _read(self, index: int) -> tuple[Any, int]:
        try:
            file, label = self.reader[index]
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None
        with closing(file) if hasattr(file, "close") else nullcontext():
            return read_picture(file, self.mode), int(-1 if label is None else label)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch, Python and numpy for a while, and leaves their states as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed % (1 << 32))
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


class _Batches:
    """The sampler: (epoch, index) of each image of each batch of an epoch, from the batch `start` on."""

    def __init__(self, images: int, batch_size: int, training: bool, seed: int) -> None:
        self.images, self.batch_size, self.training, self.seed = images, batch_size, training, seed
        self.epoch = self.start = 0
        self.own = Share()

    def __len__(self) -> int:
        return _batch_count(self.images, self.batch_size, self.training)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.images)
        if self.training:
            order = torch.randperm(self.images, generator=_generator(self.seed, self.epoch))
        # Evaluation always sees the same view, whatever the epoch.
        epoch = self.epoch if self.training else 0
        for batch in order.split(self.batch_size)[self.start : len(self)]:
            mine = batch[self.own.rows(len(batch), self.training)]
            yield [(epoch, index) for index in mine.tolist()]


def _collate(
    views: list[tuple[Tensor | None, int, list[Remark], int]],
) -> tuple[Tensor, Tensor, Tensor, list[Remark]]:
    seen = [view for view in views if view[0] is not None]
    images = torch.stack([image for image, *_ in seen]) if seen else torch.empty(0)
    labels, indices = (torch.tensor([view[at] for view in seen], dtype=torch.int64) for at in (1, 3))
    return images, labels, indices, [remark for view in views for remark in view[2]]


def _apart(_worker: int) -> None:
    """A signal to the group of a run, as a shell or a cluster sends it, is for the run, not its workers."""
    os.setpgrp()


class ImageLoader(Loader):
    """Images that are read and transformed on the way, by `workers` processes (0: by this one) that stay from
    epoch to epoch. Images that cannot be read are left out of an evaluation, in training the next one takes
    their place; how many and which is said once, by a warning.

    Batches come through torchdata's `StatefulDataLoader`. Where to go on is a matter of the sampler alone,
    since views depend on nothing else, so that a run may be resumed with another number of workers.
    """

    def __init__(
        self,
        reader: Any,
        transform: Callable,
        batch_size: int,
        *,
        mode: str = "RGB",
        training: bool = False,
        seed: int = 0,
        workers: int = 0,
        split: str = "data",
    ) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        super().__init__(seed)
        self.reader, self.split, self.training = reader, split, training
        root = getattr(reader, "root", None)
        self._root = root if isinstance(root, (str, os.PathLike)) and os.path.isdir(root) else None
        self._sampler = _Batches(len(reader), batch_size, training, seed)
        self._view, self.images_count = f"{mode} {transform}", len(reader)
        self.batch_size = batch_size
        self._said: dict[str, set[int]] = {}
        self._first: dict[str, Remark] = {}
        with _quiet():
            self._loader = StatefulDataLoader(
                Views(reader, transform, mode, seed, training),
                batch_sampler=self._sampler,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=torch.cuda.is_available(),
                collate_fn=_collate,
                generator=_generator(seed, 0),
                worker_init_fn=_apart,
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The names and labels of the images, by a digest, and how they are changed."""
        seen, samples = hashlib.sha256(), getattr(self.reader, "samples", None)
        for index, sample in enumerate(samples or ()):
            # A folder may have moved: only where in it an image stands counts.
            seen.update(f"{_name(self.reader, index, absolute=False)} {sample[-1]}".encode(errors="replace"))
        own = getattr(getattr(self.reader, "dataset", None), "_fingerprint", "")
        images = f"{len(self.reader)} {own} {seen.hexdigest()[:32]}"
        return {
            "images": images,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "view": re.sub(r" at 0x\w+", "", " ".join(self._view.split())),
        }

    def __len__(self) -> int:
        return len(self._sampler)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self._sampler.epoch, self._sampler.start, self._sampler.own = epoch, start, self.own
        new = False
        with _quiet():
            batches = iter(self._loader)
        for images, labels, indices, remarks in batches:
            for remark in remarks:
                known = self._said.setdefault(remark.what, set())
                new = new or remark.index not in known
                known.add(remark.index)
                self._first.setdefault(remark.what, remark)
            if remarks and self._root is not None and not os.path.isdir(self._root):
                raise FileNotFoundError(f"data: the folder {str(self._root)!r} is gone; put it back")
            if len(labels):
                yield images, labels, indices
            elif self.training:
                raise ValueError(f"{self.split}: no image of a whole batch can be read; {self._remarks()}")
        if new:
            warnings.warn(f"{self.split}: {self._remarks()}", stacklevel=3)

    def _remarks(self) -> str:
        """What has been found so far, in one line."""
        parts = []
        for what, found in self._said.items():
            first = self._first[what]
            name, why = repr(_name(self.reader, first.index)), f" ({first.why})" if first.why else ""
            then = ""
            if what == CANNOT_READ:
                then = ", others take their place" if self.training else " and are left out"
            parts.append(f"{len(found)} of {len(self.reader)} images {what}{then}, first {name}{why}")
        return "; ".join(parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of a function that is about to go, and of workers, which `load_data` says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*|This DataLoader will create")
        yield


def _name(reader: Any, index: int, absolute: bool = True) -> str:
    try:
        return str(reader.filename(index, absolute=absolute) or index)
    except (AssertionError, AttributeError, KeyError, TypeError):
        return f"number {index}"

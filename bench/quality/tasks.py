"""Two small tasks, generated with fixed seeds: nothing is downloaded, every machine draws the same images.

`digits`: scikit-learn's digits at a random place on a noisy 10x10 canvas; train, validation and test come
from different originals. `shapes`: a drawn shape filled with a grating, among clutter, 16x16; ten classes,
the shape (five) and the direction of its grating (two), so that neither alone is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uvc.training.data import Loader


@dataclass(frozen=True)
class Split:
    """Images float32 [n, 1, size, size] and labels int64 [n]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A task. size: side of an image; patch: side of a patch; draw: gives (train, validation, test)."""

    name: str
    size: int
    patch: int
    draw: Callable[[], tuple[Split, Split, Split]]


def digits() -> tuple[Split, Split, Split]:
    """12,000 training images from 1,000 originals, 891 for validation from 297, 3,000 for the test from
    500.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(range(1797), test_size=500, stratify=data.target, random_state=0)
    train, val = train_test_split(train, test_size=297, stratify=data.target[train], random_state=0)
    images = torch.tensor(data.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    labels = torch.tensor(data.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    parts = ((train, 12), (val, 3), (test, 6))
    return tuple(_place(images[rows], labels[rows], times, generator) for rows, times in parts)


def _place(images: Tensor, labels: Tensor, times: int, generator: torch.Generator) -> Split:
    """Every original `times` times, at one of nine places, under noise."""
    images, labels = images.repeat(times, 1, 1), labels.repeat(times)
    canvas = torch.zeros(len(labels), 10, 10)
    for i, (top, left) in enumerate(torch.randint(3, (len(labels), 2), generator=generator).tolist()):
        canvas[i, top : top + 8, left : left + 8] = images[i]
    canvas += DIGITS_NOISE * torch.randn(canvas.shape, generator=generator)
    return Split((canvas[:, None] - 0.2) / 0.45, labels)


DIGITS_NOISE = 0.2
SHAPES_NOISE = 0.15


def shapes() -> tuple[Split, Split, Split]:
    """12,000 training images, 1,000 for validation, 10,000 for the test."""
    return tuple(_drawn(count, 100 + i) for i, count in enumerate((12_000, 1000, 10_000)))


def _drawn(count: int, seed: int, size: int = 16) -> Split:
    """Shapes of random place, size, turn and contrast, with a grating inside and strokes around."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator))[:, None, None]

    labels = torch.arange(count) % 10
    axis = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x0, y0, radius, turn = uniform(-1.5, 1.5), uniform(-1.5, 1.5), uniform(5, 6.5), uniform(-0.2, 0.2)
    u = ((x - x0) * turn.cos() + (y - y0) * turn.sin()) / radius
    v = ((y - y0) * turn.cos() - (x - x0) * turn.sin()) / radius
    r = (u * u + v * v).sqrt()
    distances = torch.stack(
        [
            r - 0.9,  # disc
            torch.maximum(u.abs(), v.abs()) - 0.8,  # square
            torch.maximum(0.87 * u.abs() + 0.5 * v, -v) - 0.5,  # triangle
            torch.minimum(
                torch.maximum(u.abs() - 0.3, v.abs() - 1), torch.maximum(v.abs() - 0.3, u.abs() - 1)
            ),  # cross
            (r - 0.72).abs() - 0.25,  # ring
        ]
    )  # [5, n, size, size]
    inside = (-distances[labels % 5, torch.arange(count)] * radius * 2).sigmoid()
    steep = (labels // 5).float()[:, None, None] * (math.pi / 2) + uniform(-0.3, 0.3)
    wave = torch.sin((x * steep.cos() + y * steep.sin()) * uniform(1.5, 2.1) + uniform(0, 2 * math.pi))
    contrast = uniform(0.7, 1.2)
    images = inside * contrast * (0.55 + 0.45 * wave)
    for _ in range(2):  # clutter: short strokes anywhere
        angle, offset, along = uniform(0, math.pi), uniform(-7, 7), uniform(-7, 7)
        across = x * angle.cos() + y * angle.sin() - offset
        length = (-x * angle.sin() + y * angle.cos() - along).abs()
        images = (
            images + uniform(-0.7, 0.7) * ((0.7 - across.abs()) * 4).sigmoid() * ((3 - length) * 4).sigmoid()
        )
    images = images + SHAPES_NOISE * torch.randn(images.shape, generator=generator)
    return Split((images / 0.5)[:, None], labels)


TASKS = {"digits": Task("digits", 10, 2, digits), "shapes": Task("shapes", 16, 4, shapes)}


EPOCH_IMAGES = 4000


class Batches(Loader):
    """Training batches in random order; `images` and `rows` name the batch handed out last.

    An epoch is `EPOCH_IMAGES` images, the next part of a random order of all of them.
    """

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        super().__init__(seed)
        self.split, self.batch_size = split, batch_size
        self.images: Tensor | None = None
        self.rows: Tensor | None = None

    def __len__(self) -> int:
        return EPOCH_IMAGES // self.batch_size

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rounds, part = divmod(epoch, len(self.split.labels) // EPOCH_IMAGES)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rounds)
        order = torch.randperm(len(self.split.labels), generator=generator)
        order = order[part * EPOCH_IMAGES : (part + 1) * EPOCH_IMAGES]
        for rows in order.split(self.batch_size)[start : len(self)]:
            self.rows, self.images = rows, self.split.images[rows]
            yield self.images, self.split.labels[rows], rows


class Remembered(nn.Module):
    """A frozen teacher that answers from memory for the batch that `batches` has just handed out.

    Training images are not augmented, so one pass serves all epochs of all arms: logits [images, classes].
    """

    def __init__(self, teacher: nn.Module, logits: Tensor, batches: Batches) -> None:
        super().__init__()
        self.teacher, self.batches = teacher.eval().requires_grad_(False), batches
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        known = images is self.batches.images
        return self.logits[self.batches.rows] if known else self.teacher(images)

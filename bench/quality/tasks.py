"""Three small tasks, generated with fixed seeds: nothing is downloaded, every machine draws the same images.

`digits`: scikit-learn's digits at a random place on a noisy 10x10 canvas; train, validation and test come
from different originals. `shapes`: a drawn shape filled with a grating, among clutter, 16x16; ten classes,
the shape (five) and the direction of its grating (two), so that neither alone is enough. `pairs`: two of the
shapes side by side among clutter, 24x24; the class is which is left and which right (25), so that a model
which tells shapes apart less well loses twice.
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
    classes: int = 10


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
PAIRS_NOISE = 0.2


def shapes() -> tuple[Split, Split, Split]:
    """12,000 training images, 1,000 for validation, 10,000 for the test."""
    return tuple(_one_shape(count, 100 + i) for i, count in enumerate((12_000, 1000, 10_000)))


def pairs() -> tuple[Split, Split, Split]:
    """24,000 training images, 1,000 for validation, 10,000 for the test."""
    return tuple(_two_shapes(count, 200 + i) for i, count in enumerate((24_000, 1000, 10_000)))


def _one_shape(count: int, seed: int, size: int = 16) -> Split:
    """Shapes of random place, size, turn and contrast, with a grating inside and strokes around."""
    labels, canvas = torch.arange(count) % 10, _Canvas(count, seed, size)
    uniform = canvas.uniform
    place = (uniform(-1.5, 1.5), uniform(-1.5, 1.5))
    canvas.add(labels % 5, place, uniform(5, 6.5), labels // 5, 0.55)
    canvas.strokes(0.5 * size - 1)
    return Split(canvas.under_noise(SHAPES_NOISE), labels)


def _two_shapes(count: int, seed: int, size: int = 24) -> Split:
    """A shape left and a shape right, each a little higher or lower, with a faint grating along x or y."""
    labels, canvas = torch.arange(count) % 25, _Canvas(count, seed, size)
    uniform = canvas.uniform
    for kinds, side in ((labels // 5, -1), (labels % 5, 1)):
        place = (side * size / 4 + uniform(-1, 1), uniform(-4, 4))
        steep = torch.randint(2, (count,), generator=canvas.generator)
        canvas.add(kinds, place, uniform(5, 6), steep, 0.7)
    canvas.strokes(0.5 * size)
    return Split(canvas.under_noise(PAIRS_NOISE), labels)


class _Canvas:
    """Images of one size, drawn over each other, from one generator."""

    def __init__(self, count: int, seed: int, size: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(seed)
        axis = torch.arange(size) - (size - 1) / 2
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")
        self.images = torch.zeros(count, size, size)

    def uniform(self, low: float, high: float) -> Tensor:
        """A number for each image [n, 1, 1]."""
        return (low + (high - low) * torch.rand(self.count, generator=self.generator))[:, None, None]

    def add(self, kinds: Tensor, place: tuple, radius: Tensor, steep: Tensor, light: float) -> None:
        """A shape of its kind [n] on each; its grating, around `light`, is along x (`steep` 0) or y."""
        turn, x, y = self.uniform(-0.2, 0.2), self.x - place[0], self.y - place[1]
        u = (x * turn.cos() + y * turn.sin()) / radius
        v = (y * turn.cos() - x * turn.sin()) / radius
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
        inside = (-distances[kinds, torch.arange(self.count)] * radius * 2).sigmoid()
        angle = steep.float()[:, None, None] * (math.pi / 2) + self.uniform(-0.3, 0.3)
        waves, start = self.uniform(1.5, 2.1), self.uniform(0, 2 * math.pi)
        wave = torch.sin((self.x * angle.cos() + self.y * angle.sin()) * waves + start)
        contrast = self.uniform(0.7, 1.2)
        self.images += inside * contrast * (light + (1.0 - light) * wave)

    def strokes(self, reach: float) -> None:
        """Clutter: two short strokes within `reach` of the middle."""
        for _ in range(2):
            angle = self.uniform(0, math.pi)
            offset, along = self.uniform(-reach, reach), self.uniform(-reach, reach)
            across = self.x * angle.cos() + self.y * angle.sin() - offset
            length = (-self.x * angle.sin() + self.y * angle.cos() - along).abs()
            self.images = (
                self.images
                + self.uniform(-0.7, 0.7)
                * ((0.7 - across.abs()) * 4).sigmoid()
                * ((3 - length) * 4).sigmoid()
            )

    def under_noise(self, deviation: float) -> Tensor:
        """What is drawn, under noise [n, 1, size, size]."""
        noise = torch.randn(self.images.shape, generator=self.generator)
        return ((self.images + deviation * noise) / 0.5)[:, None]


TASKS = {
    "digits": Task("digits", 10, 2, digits),
    "shapes": Task("shapes", 16, 4, shapes),
    "pairs": Task("pairs", 24, 6, pairs, 25),
}


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

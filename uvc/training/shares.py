"""Which rows of a global batch are whose, so that N processes together see the batches of one.

B images of a batch, W processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from uvc.training.evaluation import unpack
from uvc.training.exchange import lost

# What labels and images may be when they are sent.
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MOST_DIMS = 6


class Share(NamedTuple):
    """One of `count` parts of every batch."""

    rank: int = 0
    count: int = 1

    def rows(self, batch: int, training: bool) -> slice | Tensor:
        """The rows of this part.

        In training rows i and B - 1 - i, which mixup blends, are in the same part and the same distance from
        its ends, if B is a multiple of 2 W. In evaluation parts follow one another, equal up to one row.
        """
        if self.count == 1:
            return slice(None)
        if training and batch % (2 * self.count) == 0:
            half = batch // (2 * self.count)
            first = torch.arange(self.rank * half, (self.rank + 1) * half)
            return torch.cat([first, (batch - 1 - first).flip(0)])
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)


def check_share(loader: Any, count: int, mixes: bool) -> None:
    """ValueError unless `count` processes can share the training batches of a loader evenly, and, if it
    `mixes`, in pairs.
    """
    batch = getattr(loader, "batch_size", None)
    images = getattr(loader, "images_count", None)
    if isinstance(loader, DataLoader) and not loader.drop_last and hasattr(loader.dataset, "__len__"):
        rest = len(loader.dataset) % (batch or 1)
        if batch and rest % count:
            raise ValueError(
                f"train_loader: its last batch has {rest} images, which {count} processes cannot share "
                "evenly; give drop_last=True"
            )
    if not isinstance(batch, int):
        return
    batch = min(batch, images or batch)
    if batch % count:
        raise ValueError(
            f"batch_size: {batch} images, which {count} processes cannot share evenly; give a multiple of "
            f"{count}"
        )
    if mixes and batch // count % 2:
        raise ValueError(
            f"batch_size: {batch} images, {batch // count} for each of {count} processes; mixup and cutmix "
            f"take pairs, give a multiple of {2 * count}"
        )


class HandedOut:
    """A user's loader, read by rank 0 alone, which hands every process its rows.

    So the batches are those that one process would see, whatever their order is drawn from.
    """

    def __init__(
        self, loader: DataLoader, rank: int, count: int, device: torch.device, training: bool
    ) -> None:
        self.loader, self.share, self.device, self.training = loader, Share(rank, count), device, training

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader) if self.share.rank == 0 else None
        while True:
            batch = next(batches, None) if batches else None
            batch = (None, None) if batch is None else unpack(batch, "a loader")
            images, labels = (self._send(part) for part in batch)
            if images is None:
                return
            if self.training and len(labels) % self.share.count:
                raise ValueError(
                    f"train_loader: a batch has {len(labels)} images, which {self.share.count} processes "
                    "cannot share evenly; give drop_last=True"
                )
            rows = self.share.rows(len(labels), self.training)
            yield images[rows], labels[rows]

    def _send(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor of rank 0, in every process."""
        about = torch.full((MOST_DIMS + 1,), -1)
        if tensor is not None:
            about[0] = DTYPES.index(tensor.dtype)
            about[1 : 1 + tensor.dim()] = torch.tensor(tensor.shape)
        about = about.to(self.device)
        with lost():
            dist.broadcast(about, 0)
            kind, *shape = about.tolist()
            if kind < 0:
                return None
            if tensor is None:
                tensor = torch.empty([n for n in shape if n >= 0], dtype=DTYPES[kind])
            tensor = tensor.contiguous().to(self.device)
            dist.broadcast(tensor, 0)
        return tensor

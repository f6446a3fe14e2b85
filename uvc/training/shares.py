"""Which rows of a global batch are whose, so that N processes together see the batches of one.

B images of a batch, W processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from uvc.training.batches import mapped, rows_of, taken
from uvc.training.exchange import lost


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a batch was, while its content is sent apart."""

    shape: torch.Size
    dtype: torch.dtype


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

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader) if self.share.rank == 0 else None
        while True:
            batch = self._sent(None if batches is None else next(batches, None))
            if batch is None:
                return
            count = rows_of(batch)
            if self.training and count % self.share.count:
                raise ValueError(
                    f"train_loader: a batch has {count} images, which {self.share.count} processes "
                    "cannot share evenly; give drop_last=True"
                )
            yield taken(batch, self.share.rows(count, self.training))

    def _sent(self, batch: Any) -> Any:
        """The batch of rank 0, in every process; None after the last."""
        tensors: list[Tensor] = []

        def put_aside(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            tensors.append(part.contiguous().to(self.device))
            return _Place(part.shape, part.dtype)

        frame, mine = [mapped(batch, put_aside)], iter(tensors)
        with lost():
            dist.broadcast_object_list(frame, 0, device=self.device)

            def fill(part: Any) -> Any:
                if not isinstance(part, _Place):
                    return part
                tensor = next(mine, None)
                if tensor is None:
                    tensor = torch.empty(part.shape, dtype=part.dtype, device=self.device)
                dist.broadcast(tensor, 0)
                return tensor

            return mapped(frame[0], fill)

"""Batches of any kind: tensors in tuples, lists and dicts, beside other values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def mapped(batch: Any, change: Callable[[Any], Any], lists: bool = False) -> Any:
    """A batch with everything in its tuples, lists and dicts changed.

    lists: one of plain values, such as names, is changed as a whole.
    """
    if isinstance(batch, Mapping):
        return {name: mapped(part, change, lists) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(part, change, lists) for part in batch))
    if type(batch) in (tuple, list):
        holds = any(isinstance(part, (Tensor, Mapping, tuple, list)) for part in batch)
        if holds or not lists:
            return type(batch)(mapped(part, change, lists) for part in batch)
    return change(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    return mapped(batch, lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x)


def rows_of(batch: Any) -> int:
    """How many images a batch has: the length of its first tensor with dims; 0 without one."""
    found: list[int] = []
    mapped(batch, lambda x: found.append(len(x)) if isinstance(x, Tensor) and x.dim() else None)
    return next(filter(None, found), 0)


def taken(batch: Any, rows: slice | Tensor) -> Any:
    """Some rows of a batch: of its tensors and lists of plain values that have as many as its images."""
    count = rows_of(batch)
    places = torch.arange(count)[rows].tolist()

    def take(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[rows] if part.dim() and len(part) == count else part
        if type(part) in (tuple, list) and len(part) == count:
            return type(part)(part[place] for place in places)
        return part

    return mapped(batch, take, lists=True)

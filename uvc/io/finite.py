"""Weights that are not finite are no result: what writes them refuses, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Of layers that clip, as Gemma 4's do: infinite where they do not.
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in it; one look at each device."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and not t.is_meta}
    floats = {name: t.abs().clamp_max(1) if name.endswith(BOUNDS) else t for name, t in floats.items()}
    if not floats:
        return None
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in floats.items():
        by_device.setdefault(tensor.device, []).append(name)
    bad = set()
    for names in by_device.values():
        flags = torch.stack([floats[name].detach().isfinite().all() for name in names]).tolist()
        bad |= {name for name, finite in zip(names, flags, strict=True) if not finite}
    return next((name for name in floats if name in bad), None)


def refuse_not_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """ValueError, naming the first tensor that is not finite; ``what`` says what is refused."""
    name = first_not_finite(tensors)
    if name is not None:
        values = tensors[name]
        count = int((~values.isfinite()).sum())
        raise ValueError(f"{what}: {name} holds {count} values of {values.numel()} that are NaN or infinite")

"""Parameters of which a process may hold some rows or columns alone, as FSDP2 spreads them, or all."""

from __future__ import annotations

import torch
from torch import Tensor


def is_spread(parameter: Tensor) -> bool:
    """Whether a parameter's rows or columns are spread over processes."""
    return hasattr(parameter, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process holds, in the tensor's own memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; all must ask."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_by(parameter: Tensor) -> int | None:
    """0 where each process holds some rows of a parameter, 1 where it holds some columns, None where all."""
    return parameter.placements[0].dim if is_spread(parameter) else None


def held(parameter: Tensor) -> tuple[int, int]:
    """Of a parameter that is spread, the first of the rows or columns that this process holds, and the one
    after its last.
    """
    mesh, many = parameter.device_mesh, parameter.shape[spread_by(parameter)]
    each = -(-many // mesh.size())
    first = min(mesh.get_local_rank() * each, many)
    return first, min(first + each, many)


def add_up(parameter: Tensor, sums: Tensor) -> None:
    """Sums over what a process holds become sums over all, in place, if the parameter is spread."""
    if is_spread(parameter):
        torch.distributed.all_reduce(sums, group=parameter.device_mesh.get_group())

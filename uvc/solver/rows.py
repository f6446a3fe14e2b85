"""Parameters of which a process may hold some rows alone, as FSDP2 spreads them; of others it holds all."""

from __future__ import annotations

import torch
from torch import Tensor


def is_spread(parameter: Tensor) -> bool:
    """Whether a parameter's rows are spread over processes."""
    return hasattr(parameter, "placements")


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the tensor's own memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; all must ask."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def held(parameter: Tensor) -> tuple[int, int]:
    """The first of the rows that this process holds, and the one after its last."""
    rows = parameter.shape[0]
    if not is_spread(parameter):
        return 0, rows
    mesh = parameter.device_mesh
    each = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * each, rows)
    return first, min(first + each, rows)


def add_up(parameter: Tensor, sums: Tensor) -> None:
    """Sums over what a process holds become sums over all, in place, if the parameter is spread."""
    if is_spread(parameter):
        torch.distributed.all_reduce(sums, group=parameter.device_mesh.get_group())

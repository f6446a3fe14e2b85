"""What FSDP sends of a half that has lost rows or columns: the rest.

Weights of what is removed are read by nobody and its gradients are zero, so neither is sent; where they would
stand, processes that gather find zeros. The buffers of `fully_shard` are [W, S]: for each of W processes its
part of all parameters of the half, one after the other. A weight is spread along the dim that loses nothing
(`spread.py`), so that all processes send equally much of it. Of a parameter that is spread along the dim that
loses some, as biases are, they have lost unequally many: all send as many as the one that has kept most,
filled up with rows that are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uvc.solver.rows import spread_by
from uvc.training.reduction import Kept

# torch 2.10 has the second names alone.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class KeptParts:
    """Where the kept rows and columns of a half stand in the buffers of `fully_shard`."""

    def __init__(self, half: nn.Module, count: int) -> None:
        """half: after `fully_shard`, whose buffers have its parameters in their order."""
        self.count = count
        parameters = list(half.parameters())
        self._spread_by = [spread_by(p) for p in parameters]
        self._shapes = [_part_shape(p, count) for p in parameters]  # of a process's part, filled up
        self._trained = [p.requires_grad for p in parameters]
        self._kept: list[Kept | None] = []  # with an index of [k] for all processes, or [W, k] by process
        self.sent = 0  # bytes of this process

    def take(self, kept: Sequence[Kept | None]) -> None:
        """What is kept of each parameter from now on; None: all."""
        self._kept = []
        if any(kept):
            self._kept = [
                Kept(one.dim, self._by_process(one.index, shape[one.dim])) if one and one.dim == by else one
                for one, shape, by in zip(kept, self._shapes, self._spread_by, strict=True)
            ]

    def _by_process(self, rows: Tensor, each: int) -> Tensor:
        """[W, k]: of each process the places, among its own `each` rows, of those that are kept."""
        places = [rows[(rows // each) == rank] - rank * each for rank in range(self.count)]
        most = max(map(len, places))
        return torch.stack([torch.cat([p, p.new_zeros(most - len(p))]) for p in places])

    def packs(self, size: int, trained: bool) -> bool:
        """Whether anything is removed, and S numbers are those of all parameters, or of the trained ones."""
        return bool(self._kept) and size == sum(self._sizes(trained))

    def _sizes(self, trained: bool) -> list[int]:
        """Numbers of each parameter in the part of one process."""
        pairs = zip(self._shapes, self._trained, strict=True)
        return [shape.numel() for shape, is_trained in pairs if is_trained or not trained]

    def _parts(self, buffer: Tensor, trained: bool, ranks: slice) -> list[tuple[Tensor, tuple | None]]:
        """Views [w, rows, ...] of a buffer [w, S] of some processes, each with the index of what is kept."""
        found, start = [], 0
        for shape, kept, is_trained in zip(self._shapes, self._kept, self._trained, strict=True):
            if trained and not is_trained:
                continue
            view = buffer[:, start : start + shape.numel()].view(len(buffer), *shape)
            start += shape.numel()
            if kept is None:
                index = None
            elif kept.index.dim() == 2:
                rows = kept.index[ranks]
                index = (torch.arange(len(rows), device=rows.device)[:, None], rows)
            else:
                index = (*(slice(None),) * (1 + kept.dim), kept.index)
            found.append((view, index))
        return found

    def pack(self, buffer: Tensor, trained: bool, ranks: slice = slice(None)) -> Tensor:
        """[w, S] -> [w, K]: what is sent of it."""
        parts = self._parts(buffer, trained, ranks)
        return torch.cat([(v if i is None else v[i]).flatten(1) for v, i in parts], 1)

    def unpack(self, packed: Tensor, buffer: Tensor, trained: bool, ranks: slice = slice(None)) -> None:
        """[w, K] -> [w, S], with zeros in the place of what was not sent."""
        buffer.zero_()
        start = 0
        for view, index in self._parts(buffer, trained, ranks):
            shape = view.shape if index is None else view[index].shape
            end = start + shape[1:].numel()
            values, start = packed[:, start:end].view(shape), end
            if index is None:
                view.copy_(values)
            else:
                view[index] = values


def _part_shape(parameter: Tensor, count: int) -> torch.Size:
    shape = list(parameter.shape)
    shape[spread_by(parameter)] = -(-shape[spread_by(parameter)] // count)
    return torch.Size(shape)


class Gathers:
    """The weights of a half for all processes, as FSDP asks for them."""

    def __init__(self, parts: KeptParts) -> None:
        self.parts = parts

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """input_tensor: this process's part of output_tensor, flat, in the same memory."""
        parts = self.parts
        if async_op or not parts.packs(input_tensor.numel(), False):
            parts.sent += input_tensor.nbytes
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        rank = dist.get_rank(group)
        mine = parts.pack(input_tensor.view(1, -1), False, slice(rank, rank + 1))
        packed = mine.new_empty(parts.count, mine.shape[1])
        all_gather(packed.view(-1), mine.view(-1), group=group)
        parts.unpack(packed, output_tensor.view(parts.count, -1), False)
        parts.sent += mine.nbytes
        return None


class Reduces(Gathers):
    """The gradients of a half, of which each process gets its part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        parts = self.parts
        if async_op or not parts.packs(output_tensor.numel(), True):
            parts.sent += input_tensor.nbytes
            return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        packed = parts.pack(input_tensor.view(parts.count, -1), True)
        mine = packed.new_empty(1, packed.shape[1])
        reduce_scatter(mine.view(-1), packed.view(-1), op=op, group=group)
        rank = dist.get_rank(group)
        parts.unpack(mine, output_tensor.view(1, -1), True, slice(rank, rank + 1))
        parts.sent += packed.nbytes
        return None

"""Gradients of the global batch: means over the processes, of kept rows alone.

Gradients of what is removed are exactly zero in every process, and there are none of a half that is skipped,
so neither is sent. Gradients are packed block by block in the order in which the backward pass comes to the
blocks, which is the same in every process as they run the same structure, and a bucket is on its way while
the pass goes on. Inside of a block they have the model's order: each process may have measured another kernel
to be the fastest, which gives them in another one. No list of what must come is kept: a half that does not
run is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uvc.layers import blocks_of, listed
from uvc.training.exchange import lost

BUCKET = 25 << 20  # bytes that are sent together, as in torch's DDP


class NoReduction:
    """Gradients of one process are those of the global batch."""

    sent = 0  # bytes of the last step, of this process
    early = False  # whether already the first pass of a step needs one structure in all processes

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around passes through the model: where they exchange something, a process that is lost is said."""
        yield

    def facts(self) -> dict[str, Any]:
        """What decides the layout of what is sent."""
        return {}

    def begin(self) -> None:
        """The backward pass that follows gives the last part of the gradients of a step."""

    def finish(self, also: Sequence[Tensor]) -> None:
        """Gradients, and the tensors `also`, become means over the processes."""


class Kept(NamedTuple):
    """Which rows (dim 0) or columns (dim 1) of a parameter are kept."""

    dim: int
    index: Tensor


class Reduction(NoReduction):
    """The gradients of a converted model, or of any other, which is reduced whole."""

    def __init__(self, model: nn.Module, count: int, bucket: int = BUCKET) -> None:
        self.count, self.bucket = count, bucket
        self.blocks = [b for b in blocks_of(model) if hasattr(b, "skip_attn")]
        self._names = {p: name for name, p in model.named_parameters()}
        self._places = {p: i for i, p in enumerate(self._names)}
        blocks = listed(model).values()
        self._block_of = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
        self._kept: dict[nn.Parameter, Kept] = {}
        self._seen: dict[nn.Module, int] = {}  # a digest of each half's masks
        self._open = False
        self._next: list[nn.Parameter] = []
        self._block: list[nn.Parameter] = []  # what has come of the block that the backward pass is in
        self._bytes = self._order = 0
        self._sent: list[tuple[list[nn.Parameter], Sequence[Tensor], Tensor, Any]] = []
        self._watch()

    def _watch(self) -> None:
        for p in self._names:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._ready)

    def facts(self) -> dict[str, Any]:
        halves = [half for block in self.blocks for half in (block.attn, block.mlp)]
        for half in halves:
            masks = _masks(half)
            digest = crc32(b"".join(mask.numpy().tobytes() for mask in masks.values()))
            if self._seen.get(half) != digest:
                self._seen[half] = digest
                self._lay_out(half, masks)
        return {
            "structure": [self._seen[half] for half in halves],
            "skips": [(block.skip_attn, block.skip_mlp) for block in self.blocks],
            "order of the gradients": self._order,
        }

    def _lay_out(self, half: nn.Module, masks: dict[str, Tensor]) -> None:
        """Which rows and columns of the parameters of a half are kept."""
        lines: dict[nn.Parameter, tuple[int, Tensor]] = {}
        for part in half.parts():
            shape = part.parameter.shape
            _, line = lines.setdefault(part.parameter, (part.dim, torch.ones(shape[part.dim]).bool()))
            line[part.start : part.start + part.size] = masks[part.family].flatten()
        for parameter, (dim, line) in lines.items():
            self._kept.pop(parameter, None)
            if not line.all():
                self._kept[parameter] = Kept(dim, line.nonzero().flatten().to(parameter.device))

    def begin(self) -> None:
        self._open, self._order, self.sent = True, 0, 0

    def _ready(self, parameter: nn.Parameter) -> None:
        """Called by the backward pass when a gradient is whole."""
        if not self._open:
            return
        if self._block and self._block_of.get(parameter) != self._block_of.get(self._block[0]):
            self._close()
            if self._bytes >= self.bucket:
                self._send(())
        self._block.append(parameter)

    def _close(self) -> None:
        """The backward pass has left a block."""
        for parameter in sorted(self._block, key=self._places.get):
            self._next.append(parameter)
            self._order = crc32(self._names[parameter].encode(), self._order)
            self._bytes += parameter.grad.nbytes
        self._block = []

    def _send(self, also: Sequence[Tensor]) -> None:
        parts = [self._packed(p) for p in self._next]
        flat = torch.cat([part.detach().flatten() for part in (*parts, *also)])
        with lost():
            work = dist.all_reduce(flat, async_op=True)
        self.sent += flat.nbytes
        self._sent.append((self._next, also, flat, work))
        self._next, self._bytes = [], 0

    def finish(self, also: Sequence[Tensor]) -> None:
        self._open = False
        self._close()
        # Gradients that an earlier pass of this step gave, and the last one did not add to.
        taken = {p for parameters, *_ in self._sent for p in parameters} | set(self._next)
        self._next += [p for p in self._names if p.requires_grad and p.grad is not None and p not in taken]
        self._send(also)
        for parameters, others, flat, work in self._sent:
            with lost():
                work.wait()
            flat.div_(self.count)
            start = 0
            for tensor, kept in [(p.grad, self._kept.get(p)) for p in parameters] + [
                (tensor, None) for tensor in others
            ]:
                size = list(tensor.shape)
                if kept is not None:
                    size[kept.dim] = len(kept.index)
                end = start + torch.Size(size).numel()
                mean, start = flat[start:end].view(size), end
                if kept is None:
                    tensor.copy_(mean)
                else:
                    tensor.index_copy_(kept.dim, kept.index, mean)
        self._sent = []

    def _packed(self, parameter: nn.Parameter) -> Tensor:
        kept = self._kept.get(parameter)
        return parameter.grad if kept is None else parameter.grad.index_select(*kept)


def _masks(half: nn.Module) -> dict[str, Tensor]:
    """bool masks of the units of a half that take part, on the CPU."""
    if hasattr(half, "kept_neurons"):
        return {"neuron": half.kept_neurons}
    return {"qk": half.kept_qk, "v": half.kept_v}

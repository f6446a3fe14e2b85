"""Steps of training under torch.compile, block by block.

Blocks of one class share their code, and counts of what is kept are sizes of its inputs: a new structure is
traced only if it is the first of its kind: a half that has lost something, one that is skipped, or gates.
The gradients of a block come as soon as its backward pass has run, so that several processes reduce them
meanwhile; where FSDP spreads a block, its halves are compiled, around which weights are gathered and freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn
from uvc_kernels import by_preference

from uvc.io.runtimes import need_compiler
from uvc.layers import listed
from uvc.solver.rows import is_spread

# Kinds of one class of blocks that are compiled; what comes after them torch runs as it is, and says so.
KINDS = 64


class Compiled:
    """Runs the blocks of a model as a backend of torch.compile makes them, but in steps alone: evaluations,
    copies and files are of the model as it is.
    """

    def __init__(self, model: nn.Module, backend: str | None) -> None:
        """backend: None leaves all as it is."""
        self._blocks = list(listed(model).values()) if backend else []
        # FSDP gathers the weights of a half as it is called, which nothing may trace.
        if is_spread(next(model.parameters())):
            from uvc.training.fsdp.spread import gathered

            self._blocks = [part for block in self._blocks for part in gathered(block)]
        self._calls = []
        for block in self._blocks:
            block.compile(backend=backend)
            self._calls.append(block._compiled_call_impl)
        self._set([None] * len(self._blocks))

    def _set(self, calls: list) -> None:
        for block, call in zip(self._blocks, calls, strict=True):
            block._compiled_call_impl = call

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward and backward passes."""
        if not self._blocks:
            yield
            return
        self._set(self._calls)
        try:
            with torch._dynamo.config.patch(recompile_limit=KINDS), by_preference():
                yield
        finally:
            self._set([None] * len(self._calls))


def check_compile(backend: str | None, device: torch.device) -> None:
    """ValueError unless torch.compile has this backend, and what it needs on a device."""
    if backend is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(
            f"compile: {backend!r} is no backend of torch.compile; use one of {', '.join(known)}"
        )
    if backend == "inductor" and device.type == "cpu":
        need_compiler("compile", backend)
    elif backend == "inductor" and find_spec("triton") is None:
        raise ValueError(
            f"compile: {backend!r} needs triton on a {device.type}; install it, or leave this out"
        )

"""The gradients of a batch by one CUDA graph, which is captured again when the structure changes.

A graph is worth its capture where a step repeats: it is captured when the same structure has run `AFTER`
times in a row, which also fixes what the kernels choose by measurement, and kept until the structure changes.
Right after a capture its loss and gradients are compared with those of the plain step on the same batch;
where they differ, and where a capture fails, the run goes on without graphs and says so once. UVC_CAPTURE=0
turns them off.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uvc.layers import UVCBlock

AFTER = 3
# Of a replay against the plain step: relative to the norm of all gradients, and to the loss.
TOLERANCE = 1e-2


class Graph(Protocol):
    """What runs again as it was recorded, on the same memory."""

    def recording(self) -> AbstractContextManager: ...

    def replay(self) -> None: ...


class CudaGraph:
    """torch's own."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def recording(self) -> Iterator[None]:
        # Other threads, such as one that writes a checkpoint, may go on with what a capture forbids.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        self._graph.replay()


class Captured:
    """Gives the gradients of a step from a graph where there is one.

    graphs: makes a graph; None: none is ever made.
    """

    def __init__(self, model: nn.Module, graphs: Callable[[], Graph] | None) -> None:
        self.model, self.graphs = model, graphs
        self.blocks = [block for block in model.modules() if isinstance(block, UVCBlock)]
        self.captures = 0
        self._key: tuple | None = None
        self._forget()

    @classmethod
    def on(cls, model: nn.Module, alone: bool) -> Captured:
        """Of a model on a GPU that one process trains, unless UVC_CAPTURE is 0; of any other, none."""
        device = next(model.parameters()).device
        wanted = alone and device.type == "cuda" and os.environ.get("UVC_CAPTURE") != "0"
        return cls(model, CudaGraph if wanted else None)

    def _forget(self) -> None:
        self._seen, self._graph, self._kept = 0, None, []
        self._inputs: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._loss: Tensor | None = None

    @property
    def static(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters with what the graph writes their gradients to; a new list for every graph."""
        return self._gradients

    def gradients(
        self, inputs: tuple[Tensor, ...], settings: tuple, run: Callable[..., Tensor]
    ) -> Tensor | None:
        """The loss, and gradients in the parameters, from a graph; None where the caller has to run itself.

        inputs: what differs from step to step. settings: what else the step depends on, hashable. run: makes
        gradients of inputs, and returns the loss; it reads nothing back and has no other effect.
        """
        if self.graphs is None:
            return None
        found = structure_key(self.blocks)
        if found is None:
            return None
        structure, kept = found
        key = (structure, settings, *((t.shape, t.dtype) for t in inputs))
        if key != self._key:
            self._forget()
            # What the key names by its address stays alive as long as the key.
            self._key, self._kept = key, kept
        self._seen += 1
        if self._graph is None:
            return self._capture(inputs, run) if self._seen > AFTER else None
        return self._replay(inputs)

    def _replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss.clone()  # the next replay writes it again

    def _capture(self, inputs: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        """The plain step, then the same captured, replayed and compared."""
        state = random_states(inputs[0].device)
        loss = run(*inputs)
        parameters = list(self.model.parameters())
        plain = [parameter.grad for parameter in parameters]
        fault = unfit(self.model)
        if fault is None:
            fault = self._record(inputs, run, parameters)
        if fault is None:
            after = random_states(inputs[0].device)
            set_random_states(inputs[0].device, state)
            found = self._replay(inputs)
            fault = differs(found, loss, parameters, plain)
            set_random_states(inputs[0].device, after)
        if fault is None:
            self.captures += 1
            return found
        warnings.warn(
            f"steps are not captured in CUDA graphs from here on: {fault}", RuntimeWarning, stacklevel=2
        )
        self.graphs = None
        self._forget()
        for parameter, gradient in zip(parameters, plain, strict=True):
            parameter.grad = gradient
        return loss

    def _record(
        self, inputs: tuple[Tensor, ...], run: Callable[..., Tensor], parameters: list[nn.Parameter]
    ) -> str | None:
        """Captures the step; returns what went wrong, if anything."""
        for parameter in parameters:
            parameter.grad = None
        # New memory for every graph, as what a loss remembers by its input belongs to one of them.
        self._inputs, graph = [t.clone() for t in inputs], self.graphs()
        try:
            with graph.recording():
                self._loss = run(*self._inputs)
        except Exception as error:  # a driver may raise anything
            return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        self._graph = graph
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        return None


def structure_key(blocks: Iterable[UVCBlock]) -> tuple[tuple, list[Any]] | None:
    """What blocks keep, as something to compare, with the objects that its addresses are of; None where a
    pass has effects of its own, as gates and hooks on halves have.
    """
    key, kept = [], []
    for block in blocks:
        if block.has_gates or any(
            half._forward_pre_hooks or half._forward_hooks for half in (block.attn, block.mlp)
        ):
            return None
        attn, mlp, *rest = block.selection()
        kept += [*attn, *mlp]
        key.append((*map(id, (*attn, *mlp)), *rest))
    return tuple(key), kept


def unfit(model: nn.Module) -> str | None:
    """What of a model a graph cannot repeat: hooks that are not ours."""
    for name, module in model.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
            for hook in hooks.values():
                if not str(getattr(hook, "__module__", "")).startswith("uvc."):
                    return f"{name or type(model).__name__} has a hook, which a graph would not call"
    return None


def differs(
    loss: Tensor, plain_loss: Tensor, parameters: Iterable[nn.Parameter], plain: Iterable[Tensor | None]
) -> str | None:
    """What of loss and gradients is not that of the plain step, if anything."""
    error, size = loss.new_zeros((), dtype=torch.float64), loss.new_zeros((), dtype=torch.float64)
    for parameter, expected in zip(parameters, plain, strict=True):
        if (parameter.grad is None) != (expected is None):
            return "a replay gave other parameters gradients than the plain step"
        if expected is not None:
            error += (parameter.grad.double() - expected.double()).square().sum()
            size += expected.double().square().sum()
    far, large, one, other = torch.stack([error, size, loss.double(), plain_loss.double()]).tolist()
    if far <= TOLERANCE**2 * large and abs(one - other) <= TOLERANCE * abs(other):
        return None
    gradients = f"gradients of norm {large**0.5:.1e} by {far**0.5:.1e}"
    return f"a replay misses {gradients}, and its loss is {one:g} where the plain step has {other:g}"


def random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that a step draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Inverse of `random_states`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

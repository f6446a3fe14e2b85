"""Clipping and the optimiser's step by a CUDA graph, on gradients that a graph has made.

It is captured with every new graph of gradients, as it reads their memory. Rates are tensors on the device
there, filled before each replay. What a first replay makes of weights and moments is compared with the plain
step; where it differs, and where a capture fails, the run goes on with the plain one and says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from uvc.training.graphs.captured import TOLERANCE, Graph

Static = Sequence[tuple[nn.Parameter, Tensor]]


class CapturedUpdate:
    """Updates weights from a graph where their gradients are from one.

    graphs: makes a graph; None: none is ever made. clip: the largest norm of all gradients.
    """

    def __init__(self, graphs: Callable[[], Graph] | None, clip: float) -> None:
        self.graphs, self.clip = graphs, clip
        self.captures = 0
        self._of: tuple[Static, torch.optim.Optimizer] | None = None

    def step(self, optimizer: torch.optim.Optimizer, static: Static) -> Tensor | None:
        """The norm of the gradients, which are clipped and have updated the weights; None where the caller
        has to do both.

        static: the parameters with what a graph writes their gradients to, one object as long as it does.
        """
        if self.graphs is None or not static or any(p.grad is not gradient for p, gradient in static):
            return None
        if self._of is None or self._of[0] is not static or self._of[1] is not optimizer:
            return self._capture(optimizer, static) if repeats(optimizer, static) else None
        return self._replay(optimizer)

    def _run(self, optimizer: torch.optim.Optimizer, static: Static) -> Tensor:
        norm = nn.utils.clip_grad_norm_([p for p, _ in static], self.clip)
        optimizer.step()
        return norm

    def _replay(self, optimizer: torch.optim.Optimizer) -> Tensor:
        for rate, group in zip(self._rates, optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        return self._norm.clone()  # the next replay writes it again

    @torch.no_grad()
    def _capture(self, optimizer: torch.optim.Optimizer, static: Static) -> Tensor:
        """The plain step, then the same captured, replayed from where that began, and compared."""
        moments = [t for p, _ in static for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        touched = [*(t for pair in static for t in pair), *moments]
        before = [t.clone() for t in touched]
        norm = self._run(optimizer, static)
        plain = [t.clone() for t in touched]
        put(touched, before)
        fault = self._record(optimizer, static)
        put(touched, before)  # what stands for a graph in tests has run
        if fault is None:
            norm = self._replay(optimizer)
            fault = differs(touched, plain, before)
        if fault is None:
            self._of = (static, optimizer)
            self.captures += 1
            return norm
        put(touched, plain)
        warnings.warn(
            f"the optimiser's step is not captured in CUDA graphs from here on: {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
        self.graphs = self._of = None
        return norm

    def _record(self, optimizer: torch.optim.Optimizer, static: Static) -> str | None:
        """Captures the step; returns what went wrong, if anything."""
        device, graph = static[0][1].device, self.graphs()
        # A fused step on a GPU reads its rate as float32, one on the CPU as a number of Python's.
        kind = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.tensor(g["lr"], dtype=kind, device=device) for g in optimizer.param_groups]
        try:
            with rates_of(optimizer, self._rates), graph.recording():
                self._norm = self._run(optimizer, static)
        except Exception as error:  # a driver may raise anything
            return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        self._graph = graph
        return None


def repeats(optimizer: torch.optim.Optimizer, static: Static) -> bool:
    """Whether a step of an optimiser is the same work every time: fused, begun for all of these parameters,
    and without hooks.
    """
    hooks = (*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks)
    fused = all(group.get("fused") and "capturable" in group for group in optimizer.param_groups)
    return fused and not hooks and all(optimizer.state.get(p) for p, _ in static)


@contextmanager
def rates_of(optimizer: torch.optim.Optimizer, rates: Sequence[Tensor]) -> Iterator[None]:
    """The groups of an optimiser with these learning rates, as a capture wants them."""
    before = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"], group["capturable"] = rate, True
        yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, before, strict=True):
            group["lr"], group["capturable"] = rate, capturable


def put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes values into tensors."""
    torch._foreach_copy_(list(tensors), list(values))


def differs(found: Sequence[Tensor], plain: Sequence[Tensor], before: Sequence[Tensor]) -> str | None:
    """Whether a step has changed a tensor otherwise than the plain one, measured by what that has changed and
    by the last bit of what there is.
    """

    def norms(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(tensors))

    errors = norms(torch._foreach_sub(list(found), list(plain)))
    sizes = norms(torch._foreach_sub(list(plain), list(before)))
    allowed = TOLERANCE * sizes + torch.finfo(torch.float32).eps * norms(list(plain))
    count, worst = torch.stack([(~(errors <= allowed)).sum().to(errors.dtype), errors.max()]).tolist()
    if not count:
        return None
    return f"a replay changes {count:.0f} of {len(found)} tensors otherwise, by up to {worst:.1e}"

"""What is timed of a whole model: inference, training, search with the solver; and memory peaks."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import uvc
from uvc.config import SolverConfig
from uvc.constraints import limits
from uvc.solver import Search

Step = Callable[[int], object]


def images_and_labels(model: nn.Module, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images of the model's own input size and random labels."""
    shape = (batch, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(shape, device=device), torch.randint(model.num_classes, (batch,), device=device)


def precision(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`; nothing for float32."""
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)


def inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """The logits of `x` in evaluation mode."""
    model.eval()

    def step(_: int) -> Tensor:
        with torch.no_grad(), precision(x, dtype):
            return model(x)

    return step


def training(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Step:
    """Forward, backward and AdamW."""
    model.train()
    optimizer = _optimizer(model)

    def step(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision(x, dtype):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def searching(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Step:
    """`training` with the whole solver beside it, on a model whose structure it is made to have found.

    Skips are off, as they would change from step to step which halves run; the search is long enough that the
    structure stays while it is timed.
    """
    search, optimizer = _search(model, SolverConfig())

    def step(_: int) -> None:
        # Where `training` does it: freed after a step, they would be memory that the next variant uses.
        optimizer.zero_grad(set_to_none=True)
        search.before()
        with precision(x, dtype):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        search.observe()
        optimizer.step()
        search.step(optimizer)

    return step


def solving(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, removing: bool = False) -> Step:
    """A step of the solver alone: it reads gradients, prox, primal, dual, snap.

    `removing`: as when groups die in it: weights and optimiser are cleared and the structure is set anew.
    """
    search, optimizer = _search(model, replace(SolverConfig(), every=1))
    with precision(x, dtype):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    # The optimiser's averages exist from its first step on; dead groups are cleared in them too.
    optimizer.step()

    def step(_: int) -> None:
        search.before()
        search.observe()
        search.step(optimizer)
        if removing:
            search.remove_dead(optimizer)

    return step


def removing(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Step:
    """`solving` with groups that die in every step."""
    return solving(model, x, y, dtype, removing=True)


def _search(model: nn.Module, config: SolverConfig) -> tuple[Search, torch.optim.Optimizer]:
    """A search amid its annealing that has found the structure of `model`, and an optimiser."""
    structure = uvc.structure_of(model)
    search = Search(model, limits(model, 0.5), steps=10**6, config=replace(config, skip="none"))
    search.count = round(0.06 * search.steps)  # past the start of the annealing: every part is at work
    optimizer = _optimizer(model)
    search.remove_dead(optimizer)
    if uvc.structure_of(model) != structure:
        raise RuntimeError("the solver did not keep the structure that it was given")
    model.train()
    return search, optimizer


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)


@contextmanager
def silent() -> Iterator[None]:
    """No native message on stderr: the profiler prints some that say nothing. Errors still raise."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def standing_mib(model: nn.Module, training_phase: bool) -> float:
    """MiB of the parameters and, in training, of AdamW's two averages of each: what stands between steps."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return (3 if training_phase else 1) * parameters / 2**20


def peak_mib(step: Step, device: torch.device) -> float:
    """MiB that one more `step` allocates at its highest point, above what stands without its gradients."""
    step(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        standing = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(0)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - standing) / 2**20
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step(0)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = lowest = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        # The gradients of the step before are freed first: count from the lowest point before the highest.
        lowest = min(lowest, level)
        highest = max(highest, level - lowest)
    return highest / 2**20

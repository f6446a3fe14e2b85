"""Where the milliseconds of a forward pass go, block by block."""

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn
from uvc_kernels.timing import wait

from uvc.layers import entries_of, listed

PARTS = ("attn", "mlp", "rest")  # of a block; the rest: norms, layer scales, sums
FEWEST, MOST = 3, 20  # passes


def block_times(
    models: Mapping[str, nn.Module], images: Tensor, seconds: float = 2.0
) -> dict[str, list[list[float]]]:
    """Median milliseconds of attention, MLP and rest of each block, in whole passes in eval mode, by turns.

    What is skipped takes 0. The first pass of each model is not counted.
    """
    passes: dict[str, list[list[list[float]]]] = {name: [] for name in models}
    modes, start = {name: model.training for name, model in models.items()}, time.monotonic()
    try:
        for count in range(MOST + 1):
            for name, model in models.items():
                found = _pass(model.eval(), images)
                if count:
                    passes[name].append(found)
            if count > FEWEST and time.monotonic() - start > seconds:
                break
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {
        name: [[median(part) for part in zip(*block, strict=True)] for block in zip(*found, strict=True)]
        for name, found in passes.items()
    }


def _pass(model: nn.Module, images: Tensor) -> list[list[float]]:
    """Milliseconds of the parts of each block in one pass."""
    clocks, handles = {}, []
    blocks = {block: entries_of(block) for block in listed(model).values()}
    for block, entries in blocks.items():
        parts = [each._modules.get(name) for each in entries for name in PARTS[:2]]
        for module in (block, *(part for part in parts if part is not None)):
            clocks[module] = clock = _Clock(images.device)
            handles.append(module.register_forward_pre_hook(clock.begin))
            handles.append(module.register_forward_hook(clock.end))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for block, entries in blocks.items():
        found = [[_ms(clocks.get(each._modules.get(name))) for name in PARTS[:2]] for each in entries]
        rest = max(clocks[block].ms - sum(map(sum, found)), 0.0) / len(entries)
        rows += [[*halves, rest] for halves in found]
    return rows


def _ms(clock: "_Clock | None") -> float:
    return 0.0 if clock is None else clock.ms


class _Clock:
    """Milliseconds between the beginning and the end of a module's calls."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ms = device, 0.0

    def begin(self, *_) -> None:
        wait(self.device)
        self.begun = time.perf_counter()

    def end(self, *_) -> None:
        wait(self.device)
        self.ms += 1e3 * (time.perf_counter() - self.begun)

"""Where the milliseconds of a forward pass go, block by block."""

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn
from uvc_kernels.timing import wait

from uvc.layers import blocks_of

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
    blocks = blocks_of(model)
    for i, block in enumerate(blocks):
        for part, module in (("block", block), *((p, block._modules.get(p)) for p in PARTS[:2])):
            if module is not None:
                clocks[i, part] = clock = _Clock(images.device)
                handles.append(module.register_forward_pre_hook(clock.begin))
                handles.append(module.register_forward_hook(clock.end))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for i in range(len(blocks)):
        whole, attn, mlp = (clocks[i, p].ms if (i, p) in clocks else 0.0 for p in ("block", *PARTS[:2]))
        rows.append([attn, mlp, max(whole - attn - mlp, 0.0)])
    return rows


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

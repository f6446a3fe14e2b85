"""In which precision a training step is fastest here, measured on a copy of the model before a run begins."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from uvc_kernels.timing import milliseconds, take_turns

from uvc.config import Config
from uvc.io.dtypes import input_dtype
from uvc.io.files import one_line, write_json
from uvc.latency_table import quiet_clock
from uvc.layers import image_of
from uvc.training.checkpoint import random_state, set_random_state
from uvc.training.losses import Classification

PRECISION = "precision.json"  # what was measured, in the folder of a run
WORTH = 200  # training steps; a measurement would last longer than what it could save in fewer
SECONDS, ROUNDS = 2.0, 5
MARGIN = 0.05  # what is nearer is noise


class Precision(NamedTuple):
    """In what a run computes its products.

    asked, used: names as in `Config.precision`; ratio: time of a step in 16 bits over that in float32, None
    where it was not measured; half: the 16 bits that were measured.
    """

    asked: str
    used: str
    half: str | None = None
    ratio: float | None = None

    @property
    def slower(self) -> bool:
        """Whether the 16 bits that were asked for are slower than float32."""
        return self.asked == self.half and self.ratio > 1 + MARGIN

    @property
    def line(self) -> str:
        """What there is to say of it; "" where float32 was asked for, or 16 bits that pay."""
        if self.slower:
            advice = "--precision auto takes what is faster"
            return f"precision: {self._compared}; {advice}"
        if self.asked != "auto":
            return ""
        if self.ratio is None:
            return f"precision: {self.used}; in fewer than {WORTH} steps nothing is measured"
        return f"precision: {self.used}; {self._compared}"

    @property
    def _compared(self) -> str:
        return f"a step in {self.half} takes {self.ratio:.2f} times as long as in float32"

    def save(self, out: Path) -> None:
        """Writes it to the folder of a run."""
        write_json(out / PRECISION, self._asdict())


def settle(model: nn.Module, loader: DataLoader, config: Config, out: Path | None = None) -> Precision:
    """What a run with this config trains in; the model is left as it is, random numbers too.

    out: the folder of a run that is resumed, which knows it already.
    """
    asked = config.precision
    known = None if out is None else _read(out / PRECISION)
    if known is not None and known.asked == asked:
        return known
    steps = len(loader) * (config.warmup_epochs + config.search_epochs + config.post_epochs)
    if asked == "float32" or steps < WORTH:
        return Precision(asked, "float32" if asked == "auto" else asked)
    device = next(model.parameters()).device
    half = _half(device) if asked == "auto" else asked
    batch = getattr(loader, "batch_size", None) or config.batch_size
    ratio = measure(model, half, batch, config)
    faster = half if ratio < 1 - MARGIN else "float32"
    return Precision(asked, faster if asked == "auto" else asked, half, ratio)


def measure(model: nn.Module, half: str, batch: int, config: Config) -> float:
    """Time of a training step in the precision `half` over that in float32: the median of a few rounds."""
    device = next(model.parameters()).device
    state = random_state(device)
    try:
        step = _steps(model, batch, config)
        names = ("float32", half)
        # The first steps warm up; then as many images as leave time for all rounds.
        first = sum(timed(step, name, 1, device) for name in names)
        images = max(1, min(batch, int(1e3 * SECONDS / ROUNDS / first)))
        timers = {name: partial(timed, step, name, images, device) for name in names}
        times = take_turns(timers, ROUNDS, warm_up=0, seconds=SECONDS)
    finally:
        set_random_state(state, device)
    return statistics.median(map(truediv, times[half], times["float32"]))


def timed(step: Callable[[str, int], None], precision: str, images: int, device: torch.device) -> float:
    """Milliseconds of one step."""
    return milliseconds(lambda: step(precision, images), device, quiet_clock(device))


def _steps(model: nn.Module, batch: int, config: Config) -> Callable[[str, int], None]:
    """step(precision, images): forward pass, backward pass, clipping and AdamW on a copy of the model."""
    model = copy.deepcopy(model).train()
    parameters = list(model.parameters())
    # The work of AdamW is the same at a rate of 0, and weights stay where training found them.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay, fused=True)
    size, device = image_of(model), parameters[0].device
    images = torch.randn(batch, *size, device=device, dtype=input_dtype(model))
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(precision: str, count: int) -> None:
        loss = Classification(config.label_smoothing, precision)(model, images[:count], labels[:count])[
            "loss"
        ]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _half(device: torch.device) -> str:
    """The 16 bits in which a device may be faster: older GPUs multiply float16 alone."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"


def _read(path: Path) -> Precision | None:
    """What `Precision.save` wrote, None where there is nothing; ValueError when it is broken."""
    if not path.exists():
        return None
    try:
        return Precision(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: it cannot be read: {one_line(error)}; delete it, or start afresh"
        ) from None

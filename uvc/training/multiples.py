"""Multiples of head dims and of neurons that run well here, from a measured curve of sizes.

B batch, N tokens, H heads, K head dim, F neurons.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import nn
from uvc_kernels import autotune
from uvc_kernels.timing import milliseconds, take_turns

from uvc.config import Config
from uvc.io.dtypes import input_dtype
from uvc.io.files import one_line, write_json
from uvc.latency_table import quiet_clock
from uvc.layers import (
    Families,
    Size,
    blocks_of,
    compact_kind,
    image_of,
    layers_of,
    listed,
    sizes_of,
    units_of,
)
from uvc.structure import BlockStructure

MULTIPLES = "multiples.json"  # what was measured, in the folder of a run
CANDIDATES = (1, 2, 4, 8, 16, 32)
USUAL = (4, 8)  # where nothing may be measured
# Sizes that are rounded up to a good multiple take no longer than this share more, on average.
SLACK = 0.01
SECONDS, ROUNDS = 3.0, 15
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block
Curve = tuple[tuple[int, float], ...]  # sizes, and milliseconds of the half of a block that keeps so much


class Multiples(NamedTuple):
    """Multiples of head dims and neurons, and the curves that say so; empty where nothing was measured."""

    dims: int
    neurons: int
    dims_curve: Curve = ()
    neurons_curve: Curve = ()

    @property
    def line(self) -> str:
        """What there is to say of them."""
        how = "measured here" if self.dims_curve or self.neurons_curve else "nothing was measured"
        return f"round-to: dims {self.dims}, neurons {self.neurons}; {how}"

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Multiples:
        """What `_asdict` gave, read as JSON."""
        curves = {n: tuple((int(s), float(ms)) for s, ms in data[n]) for n in cls._fields[2:]}
        return cls(int(data["dims"]), int(data["neurons"]), **curves)


def settle(model: nn.Module, batch: int = 1, out: Path | None = None) -> Multiples:
    """The multiples for a model on its device, measured with so many images, or known already.

    out: the folder of a run that is resumed, which knows them. UVC_MEASURE=0 measures nothing.
    """
    if out is not None and (out / MULTIPLES).exists():
        return _read(out / MULTIPLES)
    if os.environ.get("UVC_MEASURE") == "0":
        return Multiples(*(largest(fits, most) for fits, most in zip(_fitting(model), USUAL, strict=True)))
    device, key = next(model.parameters()).device, _key(model, batch)
    if (known := autotune.recall(device, key)) is not None:
        return Multiples.from_data(json.loads(known))
    found = measure(model, batch)
    autotune.remember(device, key, json.dumps(found._asdict()))
    return found


def with_multiples(config: Config, found: Multiples) -> Config:
    """A config whose sizes are multiples of these."""
    return replace(config, solver=replace(config.solver, round_to=(found.dims, found.neurons)))


def save(found: Multiples, out: Path) -> None:
    """Writes them to the folder of a run."""
    write_json(out / MULTIPLES, found._asdict())


def largest(fits: Sequence[int], most: int) -> int:
    """The largest candidate that fits, up to `most`."""
    return max(m for m in fits if m <= most)


def measure(model: nn.Module, batch: int = 1) -> Multiples:
    """Times halves of the first block, compacted to sizes around a half, and reads good multiples off them.

    The model and random numbers are left as they are.
    """
    block, size = blocks_of(model)[0], sizes_of(model).each[0]
    offered, (fits_dims, fits_neurons) = sizes_of(model).families[0], _fitting(model)
    call, curves = _first_call(model, batch), []
    for whole, step, free, form in (
        (size.head_dim, max(offered.qk, 1), offered.qk or offered.v, _dims),
        (size.neurons, 4, offered.neurons, _neurons),
    ):
        sizes = around_half(whole, step) if free else ()
        forms = {n: compact_kind(block)(block, form(block, size, offered, n)).eval() for n in sizes}
        curves.append(_curve(forms, call))
    dims, neurons = (good(c, f) for c, f in zip(curves, (fits_dims, fits_neurons), strict=True))
    return Multiples(dims, neurons, *curves)


def around_half(whole: int, step: int) -> tuple[int, ...]:
    """Sizes around a half of `whole`, `step` apart, no more than 24 on either side of it."""
    reach = min(whole // 4, 24 * step) // step * step
    middle = whole // 2 // step * step
    return tuple(range(middle - reach, middle + reach + 1, step))


def good(curve: Curve, candidates: Sequence[int]) -> int:
    """The largest candidate up to which sizes can be rounded for nothing: `SLACK` more time, on average."""
    ms, found = dict(curve), 1
    for multiple in candidates:
        pairs = [(n, -(-n // multiple) * multiple) for n in ms if n % multiple]
        costs = [ms[up] / ms[n] - 1 for n, up in pairs if up in ms]
        if costs and mean(costs) <= SLACK:
            found = multiple
    return found


def _fitting(model: nn.Module) -> tuple[list[int], list[int]]:
    """The candidates that divide the head dims, and those that divide the neurons, of all blocks."""
    s = sizes_of(model)
    paired = any(offered.qk == 2 for offered in s.families)
    dims = [m for m in CANDIDATES if all(size.head_dim % m == 0 for size in s.each)]
    neurons = [m for m in CANDIDATES if all(size.neurons % m == 0 for size in s.each)]
    return [m for m in dims if not paired or m == 1 or m % 2 == 0], neurons


def _dims(block: nn.Module, size: Size, offered: Families, n: int) -> BlockStructure:
    """Attention alone, of heads of n q/k dims and n v dims, as far as they can be fewer."""
    units = units_of(layers_of(block)[0])
    units = units[: n // len(units[0])] if offered.qk else units
    qk = tuple(sorted(d for unit in units for d in unit))
    v = tuple(range(n if offered.v else size.head_dim))
    return BlockStructure(True, False, tuple(range(size.heads)), (qk,) * size.heads, (v,) * size.heads, ())


def _neurons(block: nn.Module, size: Size, offered: Families, n: int) -> BlockStructure:
    """The MLP alone, of n neurons."""
    return BlockStructure(False, True, (), (), (), tuple(range(n)))


def _first_call(model: nn.Module, batch: int) -> Call:
    """The arguments with which the first block is called on random images."""
    found: list[Call] = []
    handle = next(iter(listed(model).values())).register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    parameter, training = next(model.parameters()), model.training
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(batch, *image_of(model), generator=generator)
    try:
        with torch.inference_mode():
            model.eval()(images.to(parameter.device, input_dtype(model)))
    finally:
        handle.remove()
        model.train(training)
    return found[0]


def form_ms(form: nn.Module, call: Call) -> float:
    """Milliseconds of a block that is called so."""
    device = call[0][0].device
    return milliseconds(lambda: form(*call[0], **call[1]), device, quiet_clock(device))


def _curve(forms: Mapping[int, nn.Module], call: Call) -> Curve:
    timers = {str(n): lambda form=form: form_ms(form, call) for n, form in forms.items()}
    with torch.inference_mode():
        times = take_turns(timers, ROUNDS, 2, SECONDS)
    return tuple((n, median(times[str(n)])) for n in forms)


def _key(model: nn.Module, batch: int) -> str:
    s, parameter = sizes_of(model), next(model.parameters())
    block = type(blocks_of(model)[0]).__name__.removeprefix("UVC")
    fields = ("multiples", block, *s.each[0], model.embed_dim, s.patches, parameter.dtype, f"batch {batch}")
    return " ".join(map(str, (*fields, f"{torch.get_num_threads()} threads")))


def _read(path: Path) -> Multiples:
    try:
        return Multiples.from_data(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: it cannot be read: {one_line(error)}; delete it, or start afresh"
        ) from None

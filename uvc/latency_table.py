"""Latency as a cost: a table measured on compacted models on one device, interpolated between kept sizes.

H heads, K head dim, F neurons, L blocks. A forward pass takes `fixed` plus, for every block, a time of its
attention half, by kept heads and their mean dims, and a time of its MLP half, by kept neurons.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate, pairwise
from math import lcm
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from uvc_kernels.timing import Clock, milliseconds, take_turns

from uvc.compaction import compacted
from uvc.costs import BlockCounts, Counts, Prices, counts, total
from uvc.environment import device_name, versions_line
from uvc.layers import Families, Size, image_of, lists_of, sizes_of, units_of
from uvc.structure import BlockStructure, Structure, structure_of

Row = tuple[float, ...]
# Every unit goes alone.
FREE = Families(heads=1, qk=1, v=1, neurons=1)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a forward pass of `batch` images, as measured on one device.

    fixed: without any block. attn: one attention half, [len(heads)][len(dims)], heads from 0 to H, dims the
    mean over q/k and v of the kept heads. mlp: one MLP half, [len(neurons)]. All ascend, but where heads keep
    all dims: alike, they run as one product, which may take less than heads of different sizes.
    """

    model: str
    device: str
    threads: int
    versions: str
    batch: int
    image: tuple[int, ...]
    blocks: int
    dim: int
    fixed: float
    heads: tuple[int, ...]
    dims: tuple[int, ...]
    attn: tuple[Row, ...]
    neurons: tuple[int, ...]
    mlp: Row

    def __post_init__(self) -> None:
        sizes = (len(self.heads), len(self.dims), len(self.neurons))
        if (
            tuple(map(len, self.attn)) != (sizes[1],) * sizes[0]
            or len(self.mlp) != sizes[2]
            or min(sizes) < 2
        ):
            raise ValueError("attn and mlp must have a time for each of the heads, dims and neurons")
        ragged = [row[:-1] for row in self.attn]
        grown = all(_ascends(row) for row in (*ragged, *zip(*self.attn, strict=True), self.mlp))
        if not grown or not 0 < self.fixed < float("inf"):
            raise ValueError("times must be finite, above zero, and grow with what is kept")

    def block(self, index: int, kept: BlockCounts) -> float:
        """Milliseconds of a block that keeps `kept`, the same for every block."""
        attn, mlp, qk, v, neuron, heads = kept
        time = attn * self._attn(heads, (qk + v) / (2 * heads) if heads > 0 else 0.0) if attn else 0.0
        return time + (mlp * _between(self.neurons, self.mlp, neuron) if mlp else 0.0)

    def at(self, counts: Counts) -> Prices:
        """Milliseconds of one more dim or neuron where the blocks keep `counts`: the slope of what an eighth
        less of the head dim, or of the neurons, would save.
        """
        columns = (part.tolist() if isinstance(part, torch.Tensor) else part for part in counts)
        rows = [self._prices(BlockCounts(*kept)) for kept in zip(*columns, strict=True)]
        return Prices(self.fixed, *map(tuple, zip(*rows, strict=True)))

    def _prices(self, kept: BlockCounts) -> tuple[float, float, float, float, float]:
        heads, head_dim, hidden = max(kept.heads, 1.0), self.dims[-1], self.neurons[-1]
        units = kept.qk + kept.v
        # Full heads are priced as what they become when they lose a dim.
        high = max(min(units / (2 * heads), self.dims[-2]), head_dim / 8)
        low = high - head_dim / 8
        now = self._attn(heads, high)
        dim = (now - self._attn(heads, low)) / (high - low) / (2 * heads)
        # No unit is free: a price of zero could not order anything.
        dim = max(dim, 0.02 * (self.attn[-1][-2] - self.attn[0][-2]) / (2 * self.heads[-1] * self.dims[-2]))
        most = max(kept.neuron, hidden / 8)
        neuron = self._mlp(most) - self._mlp(most - hidden / 8)
        neuron = max(neuron / (hidden / 8), 0.02 * (self.mlp[-1] - self.mlp[0]) / hidden)
        whole = kept._replace(attn=1, mlp=0)
        attn = self.block(0, whole) - dim * units
        return attn, self._mlp(kept.neuron) - neuron * kept.neuron, dim, dim, neuron

    def _attn(self, heads: float, dims: float) -> float:
        return _between(self.heads, [_between(self.dims, row, dims) for row in self.attn], heads)

    def _mlp(self, neurons: float) -> float:
        return _between(self.neurons, self.mlp, neurons)

    def check(self, model: nn.Module) -> None:
        """ValueError unless this table was measured on a model of the same shapes."""
        size, depth = _one_size(model)
        own = (self.blocks, self.dim, self.heads[-1], self.dims[-1], self.neurons[-1], tuple(self.image))
        image = image_of(model)
        mine = (depth, model.embed_dim, *size, image)
        if own != mine:
            raise ValueError(
                f"latency table: it is of {self.model}; blocks, width, heads, head dim, neurons, image are "
                f"{own} there and {mine} here; measure this model"
            )

    def to_json(self) -> str:
        """This table as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The table written by `to_json`; ValueError, in one line, for anything else."""
        try:
            data = json.loads(text)
            names = {field.name for field in fields(cls)}
            if not isinstance(data, dict) or set(data) != names:
                raise ValueError(f"it must have exactly the keys {', '.join(sorted(names))}")
            return cls(**{name: _tuples(value) for name, value in data.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"latency table: {error}; measure it again") from None

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """The table in a file; ValueError, in one line, when it cannot be read."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no latency table: {error}") from None


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _ascends(row: Sequence[float]) -> bool:
    return all(0 <= a <= b < float("inf") for a, b in pairwise(row))


def _between(grid: Sequence[float], values: Sequence[float], x: float) -> float:
    """The piecewise linear function through (grid, values) at x, constant outside."""
    i = min(max(bisect_right(grid, x) - 1, 0), len(grid) - 2)
    share = min(max((x - grid[i]) / (grid[i + 1] - grid[i]), 0.0), 1.0)
    return values[i] + share * (values[i + 1] - values[i])


class Check(NamedTuple):
    """What a table predicted of a compacted model, and what was timed: fractions of dense, milliseconds."""

    predicted: float
    measured: float
    dense_ms: float
    compacted_ms: float


def verify(table: LatencyTable, dense: nn.Module, small: nn.Module, rounds: int = 30) -> Check:
    """Times a compacted model beside its dense one, taking turns, at the batch of the table.

    The measured fraction is the median over turns, the device that of the models, whatever the table's.
    """
    parameter = next(dense.parameters())
    images = torch.randn(table.batch, *table.image, device=parameter.device, dtype=parameter.dtype)
    whole_ms, part_ms = _passes([dense, small], images, quiet_clock(images.device), rounds)
    predicted, whole = (
        total(table, counts(structure)) for structure in (structure_of(small), Structure.dense(small))
    )
    measured = median(_shares(part_ms, whole_ms))
    return Check(predicted / whole, measured, median(whole_ms), median(part_ms))


def quiet_clock(device: torch.device) -> Clock:
    """The thread's own where one CPU thread computes: the wall's would count the other work of a busy machine
    too, and more of it the longer the pass.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def pass_ms(model: nn.Module, images: Tensor, clock: Clock) -> float:
    """Milliseconds of one forward pass."""
    return milliseconds(lambda: model(images), images.device, clock)


def _passes(
    models: Sequence[nn.Module], images: Tensor, clock: Clock, rounds: int, seconds: float = float("inf")
) -> list[list[float]]:
    """Milliseconds of the forward passes through each model, in eval mode, by turns."""
    modes = [model.training for model in models]
    timers = {str(i): partial(pass_ms, model.eval(), images, clock) for i, model in enumerate(models)}
    try:
        with torch.inference_mode():
            # Caches and allocators warm up in the first two rounds.
            return list(take_turns(timers, rounds, 2, seconds).values())
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _shares(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]


def measure_latency(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int = 20, seconds: float = 5.0
) -> dict[str, float]:
    """Median milliseconds of one forward pass of `images` [B, C, H, W] through each model, taking turns.

    It ends after `repeats` rounds, or after `seconds` and three rounds.
    """
    times = _passes(list(models.values()), images, time.perf_counter, repeats, seconds)
    return dict(zip(models, map(median, times), strict=True))


def measure(
    model: nn.Module, batch: int = 1, round_to: tuple[int, int] = (1, 1), rounds: int = 15
) -> LatencyTable:
    """Times compacted forms of a timm or converted model on the device it is on.

    In each form all blocks run the same half, cut to one size of the table, as a search leaves it: with
    multiples of 1 heads differ in their dims. Every form takes turns with the dense model, so that a slower
    machine slows both.

    Args:
        batch: images per forward pass.
        round_to: (dims, neurons) of ``SolverConfig.round_to``: sizes are multiples of these.
        rounds: turns of each form; the median counts.
    """
    s, depth = _one_size(model)
    size, parameter = image_of(model), next(model.parameters())
    images = torch.randn(batch, *size, device=parameter.device, dtype=parameter.dtype)
    dense = compacted(model, Structure.dense(model)).eval()

    def share(block: BlockStructure) -> float:
        """Time of the form whose blocks all are `block`, over that of the dense model."""
        form = compacted(model, Structure((block,) * depth)).eval()
        whole_ms, form_ms = _passes([dense, form], images, clock, rounds)
        dense_ms.extend(whole_ms)
        return median(_shares(form_ms, whole_ms))

    clock, dense_ms = quiet_clock(images.device), []
    offered, units = _offers(model)
    multiple = lcm(round_to[0], max(offered.qk, 1))
    heads, dims = _sizes(s, offered, multiple)
    neurons = _grid(s.neurons, round_to[1], 8) if offered.neurons else (s.neurons,)
    nothing = BlockStructure(False, False, (), (), (), ())
    fixed = share(nothing)
    attn = [[share(_attn_form(s, h, d, multiple, offered, units)) - fixed for d in dims] for h in heads]
    bare = share(BlockStructure(True, False, (), (), (), ())) - fixed
    mlp = [share(BlockStructure(False, True, (), (), (), tuple(range(n)))) - fixed for n in neurons]
    empty = share(BlockStructure(False, True, (), (), (), ())) - fixed
    attn, mlp = [[bare] * len(dims), *attn], _monotone([[empty, *mlp]])[0]
    ragged, full = _monotone([row[:-1] for row in attn]), _monotone([[row[-1] for row in attn]])[0]
    attn = [[*row, last] for row, last in zip(ragged, full, strict=True)]
    # The halves of the dense model, one by one, take a little more or less than in one go.
    scale = (1.0 - fixed) / (attn[-1][-1] + mlp[-1]) / depth * median(dense_ms)
    return LatencyTable(
        model=getattr(model, "default_cfg", {}).get("architecture") or type(model).__name__,
        device=device_name(parameter.device),
        threads=torch.get_num_threads(),
        versions=versions_line(),
        batch=batch,
        image=size,
        blocks=depth,
        dim=model.embed_dim,
        fixed=fixed * median(dense_ms),
        heads=(0, *heads),
        dims=dims,
        attn=tuple(tuple(t * scale for t in row) for row in attn),
        neurons=(0, *neurons),
        mlp=tuple(t * scale for t in mlp),
    )


def _one_size(model: nn.Module) -> tuple[Size, int]:
    """The size of all blocks of a model, and how many these are; ValueError where they differ."""
    sizes = sizes_of(model)
    if len(lists_of(model)) > 1:
        raise ValueError(
            "latency table: the model has several stages, of which each needs its own; budget macs"
        )
    return sizes.of_all("latency table"), len(sizes.blocks)


def _offers(model: nn.Module) -> tuple[Families, list[list[int]]]:
    """What all blocks of a model offer, and the q/k dims of a head by what goes together."""
    sizes = sizes_of(model)
    if len(set(sizes.families)) > 1:
        raise ValueError("latency table: blocks of this model offer different families; budget macs")
    return sizes.families[0], units_of(sizes.layers[0][0])


def _grid(whole: int, multiple: int, parts: int) -> tuple[int, ...]:
    """About ``parts`` sizes up to ``whole``, evenly spaced multiples of ``multiple``.

    With multiples of 1 all but the last are odd, as most of what a search leaves is no round number.
    """
    sizes = {max(round(whole * i / parts / multiple) * multiple, multiple) for i in range(1, parts)}
    if multiple == 1 and whole > 8 * parts:
        sizes = {n - 1 + n % 2 for n in sizes}
    return tuple(sorted(sizes | {whole}))


def _sizes(s: Size, offered: Families, multiple: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The heads, and the mean dims of a head, at which attention is timed: those that it offers."""
    heads = _grid(s.heads, 1, 6) if offered.heads else (s.heads,)
    dims = {*_grid(s.head_dim, multiple, 4), max(s.head_dim - multiple, multiple)}
    if not (offered.qk and offered.v):
        # Those of q and k, or of v, all stay: the mean is more than half of a head.
        dims = {d for d in dims if 2 * d > s.head_dim} | {s.head_dim // 2 + 1}
    return heads, tuple(sorted(dims))


def _attn_form(
    s: Size,
    heads: int,
    dims: int,
    multiple: int,
    offered: Families = FREE,
    units: Sequence[Sequence[int]] | None = None,
) -> BlockStructure:
    """Only attention, of some heads whose q/k and v dims have the mean ``dims``, apart where they can be.

    What is not offered stays; ``units``: q/k dims by what goes together, None: each alone.
    """
    units = [[dim] for dim in range(s.head_dim)] if units is None else units
    reach = min(dims - 1, s.head_dim - dims, max(dims // 4, multiple)) // multiple
    offsets = [round(reach * (2 * i + 1 - heads) / heads) or reach for i in range(heads)]
    sizes = [(dims + multiple * offset, dims - multiple * offset) for offset in offsets]
    if not offered.qk:
        sizes = [(s.head_dim, max(2 * dims - s.head_dim, 1) if offered.v else s.head_dim)] * heads
    elif not offered.v:
        sizes = [(max(2 * dims - s.head_dim, 0), s.head_dim)] * heads
    qk = tuple(tuple(sorted(d for unit in units[: n // len(units[0])] for d in unit)) for n, _ in sizes)
    v = tuple(tuple(range(n)) for _, n in sizes)
    return BlockStructure(True, False, tuple(range(heads)), qk, v, ())


def _monotone(rows: list[list[float]]) -> list[list[float]]:
    """The rows, made to grow along rows and columns: the mean of the least growing table above them and the
    greatest below; not less than zero.
    """

    def highest(table: list[list[float]]) -> list[list[float]]:
        along = [list(accumulate(row, max)) for row in table]
        return [
            list(row) for row in zip(*(accumulate(c, max) for c in zip(*along, strict=True)), strict=True)
        ]

    above = highest(rows)
    below = [
        [-t for t in row[::-1]] for row in highest([[-t for t in row[::-1]] for row in rows[::-1]])[::-1]
    ]
    return [
        [max((a + b) / 2, 0.0) for a, b in zip(*pair, strict=True)] for pair in zip(above, below, strict=True)
    ]

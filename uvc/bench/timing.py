"""Interleaved timing, in samples and noise bands: in every round each variant is timed once.

On a GPU the device is kept waiting while the host enqueues, so that events time the device and not the host;
calls that are too short for that are captured in a graph and replayed.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from uvc_kernels.timing import Clock, Timer, milliseconds, turn

Call = Callable[[int], object]  # takes a running number, by which calls rotate among their inputs
SHORTEST_MS = 2.0  # a sample repeats its call until it is this long
FLOOR = 0.02  # what two processes differ by whatever the samples say: alignment, memory layout
NORMAL_P80 = 0.8416  # a normal distribution's 80th percentile, in standard deviations


class Timing(NamedTuple):
    """Milliseconds per call, one sample per round; `timer`: wall, process, events or graph."""

    samples: tuple[float, ...]
    timer: str

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        """Linear interpolation between the sorted samples."""
        return percentile(self.samples, share)


def percentile(samples: tuple[float, ...], share: float) -> float:
    """The `share` quantile of `samples`, by linear interpolation."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratio(base: Timing, other: Timing) -> tuple[float, float]:
    """How many times as fast as `base` `other` is, and the band, a fraction, in which a second run falls.

    The median of the ratios of the rounds: what slows one round slows both. Its standard error is the larger
    of two: 1.25 sigma / sqrt(n) with sigma from p20 and p80 of n rounds, as if no round knew of the others;
    and half of what the medians of the earlier and the later rounds differ by, for a machine whose load comes
    and goes. Two runs differ by less than 2.6 sqrt(2) of it in 99 of 100 pairs where it is known; as few
    rounds know little of it, 4/n of that are added, and then 2%.
    """
    ratios = tuple(a / b for a, b in zip(base.samples, other.samples, strict=True))
    n, middle = len(ratios), statistics.median(ratios)
    sigma = (percentile(ratios, 0.8) - percentile(ratios, 0.2)) / (2 * NORMAL_P80)
    half = max(1, n // 2)
    apart = abs(statistics.median(ratios[:half]) - statistics.median(ratios[-half:]))
    error = max(1.25 * sigma / n**0.5, apart / 2)
    return middle, FLOOR + 2.6 * 2**0.5 * (1 + 4 / n) * error / middle


class Round:
    """Times several calls side by side on one device.

    Args:
        calls: by name; each is called with a running number.
        device: where they run.
        inputs: among how many inputs the calls rotate; a graph replays one call for each.
        clock: seconds, for the CPU.
        replay: whether short calls may be captured in a graph; not on the default stream.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        device: torch.device,
        inputs: int = 1,
        clock: Clock = time.perf_counter,
        replay: bool = False,
    ) -> None:
        self.device, self.clock, self.inputs = device, clock, inputs
        self.samples: dict[str, list[float]] = {name: [] for name in calls}
        self.notes: dict[str, str] = {}  # what could not be replayed, and why
        self._count = 0
        prepare = self._on_gpu if device.type == "cuda" else self._on_cpu
        self._timers = {name: prepare(name, call, replay) for name, call in calls.items()}

    def run(self) -> None:
        """One sample of each."""
        for name, ms in turn({name: timer for name, (timer, _) in self._timers.items()}, self._count).items():
            self.samples[name].append(ms)
        self._count += 1

    def timings(self) -> dict[str, Timing]:
        """What was measured so far."""
        return {name: Timing(tuple(s), self._timers[name][1]) for name, s in self.samples.items()}

    def _on_cpu(self, name: str, call: Call, replay: bool) -> tuple[Timer, str]:
        def sample(repeats: int) -> float:
            def calls() -> None:
                for _ in range(repeats):
                    call(next(numbers))

            return milliseconds(calls, self.device, self.clock) / repeats

        numbers = count()
        warm = [sample(1) for _ in range(2)][-1]
        repeats = max(1, round(SHORTEST_MS / max(warm, 1e-3)))
        return partial(sample, repeats), "process" if self.clock is time.process_time else "wall"

    def _on_gpu(self, name: str, call: Call, replay: bool) -> tuple[Timer, str]:
        for i in range(3 * self.inputs):
            call(i)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for i in range(self.inputs):
            call(i)
        host = 1e3 * (time.perf_counter() - start) / self.inputs
        torch.cuda.synchronize(self.device)
        whole = 1e3 * (time.perf_counter() - start) / self.inputs
        # The device was waiting for the host: what was timed is the launches.
        if replay and host > 0.5 * whole and _on_side_stream(self.device):
            try:
                graph = self._capture(call)
            except RuntimeError as error:
                torch.cuda.synchronize(self.device)
                self.notes[name] = f"not captured in a graph: {str(error).splitlines()[0]:.100}"
            else:
                turns = max(1, round(SHORTEST_MS / (whole * self.inputs)))
                return lambda: self._events(graph.replay, turns, 0.05 * turns) / self.inputs, "graph"
        turns = max(self.inputs, round(SHORTEST_MS / whole))
        numbers = count()
        return lambda: self._events(lambda: call(next(numbers)), turns, host * turns), "events"

    def _capture(self, call: Call) -> torch.cuda.CUDAGraph:
        # Backward passes run on the stream of their forward pass, so that must be the one that is captured.
        stream, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(self.inputs):
                call(i)
        return graph

    def _events(self, run: Callable[[], object], turns: int, host_ms: float) -> float:
        """Device milliseconds per turn, with the queue filled before the device may begin."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # About two cycles per nanosecond; longer than the host needs to enqueue everything.
        torch.cuda._sleep(int(2e6 * min(1.5 * host_ms + 0.2, 200.0)))
        begin.record()
        for _ in range(turns):
            run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / turns


def _on_side_stream(device: torch.device) -> bool:
    """The default stream cannot be captured: whoever wants graphs sets another one first."""
    return torch.cuda.current_stream(device) != torch.cuda.default_stream(device)

"""What a run tells its user: log, progress, picture of the structure, latency, final table."""

import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rich.table import Table

    from uvc.structure import Structure


class RunLog:
    """Writes `out/log.jsonl` (one JSON line per logged step) and TensorBoard events, and shows progress.

    On a terminal progress is a bar; elsewhere it is a plain line at about every tenth of a phase. With
    `out=None` nothing is written, with `progress=False` nothing is shown. A resumed run appends to its log.
    """

    def __init__(self, out: Path | None, progress: bool = False) -> None:
        self._phase, self._step, self._total, self._tenth = "", 0, 0, 0
        self._start = time.monotonic()
        self._file = self._events = self._progress = self._task = self._console = None
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter

            out = Path(out)
            out.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(out / "log.jsonl")
            # Line-buffered: a killed run loses at most the line being written.
            self._file = open(out / "log.jsonl", "a", buffering=1)
            self._events = SummaryWriter(str(out / "tensorboard"))
        if progress:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)

    def phase(self, name: str, total_steps: int) -> None:
        """Start a phase ('teacher', 'warmup', 'search', 'post-train') of `total_steps` steps."""
        self._end_bar()
        self._phase, self._step, self._total, self._tenth = name, 0, total_steps, 0
        self._start = time.monotonic()
        if self._console is not None and self._console.is_terminal:
            self._start_bar()

    def step(self, step: int, **scalars: float) -> None:
        """Log the scalars of one step, counted from 0 within the phase, and advance the progress to it."""
        self._step = step + 1
        self._write({"phase": self._phase, "step": step, **scalars})
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(f"{self._phase}/{name}", value, step)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._step, figures=_figures(scalars))
        elif self._console is not None and self._new_tenth():
            seconds = time.monotonic() - self._start
            self._console.print(
                f"{self._phase:<10} {self._step:>6}/{self._total}  {seconds:5.0f} s  {_figures(scalars)}",
                soft_wrap=True,
            )

    def note(self, **fields: Any) -> None:
        """Write one JSON line that is no step, such as the validation accuracy of an epoch."""
        self._write({"phase": self._phase, **fields})
        if self._events is not None:
            for name, value in fields.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(f"{self._phase}/{name}", value, self._step)

    def close(self) -> None:
        """Flush and close the files; calling it twice is fine."""
        self._end_bar()
        for resource in (self._file, self._events):
            if resource is not None:
                resource.close()
        self._file = self._events = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, fields: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_plain(fields)) + "\n")

    def _new_tenth(self) -> bool:
        """Whether a further tenth of the phase has been done since this was last true."""
        tenth = self._step * 10 // max(self._total, 1)
        new = tenth > self._tenth
        self._tenth = max(tenth, self._tenth)
        return new

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task(self._phase, total=self._total, figures="")

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last line end, left by a run that was killed while writing."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _figures(scalars: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(scalars.items())[:4])


def _plain(value: Any) -> Any:
    """The value in types of strict JSON: tensors and numpy scalars as numbers, nan and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_plain(value), indent=2) + "\n")
    os.replace(part, path)


def measure_latency(
    models: Mapping[str, nn.Module], images: Tensor, repeats: int = 20, seconds: float = 5.0
) -> dict[str, float]:
    """Median milliseconds of one forward pass of `images` [B, C, H, W] through each model.

    The models take turns, so that a busy moment of the machine hits all of them. It ends after `repeats`
    rounds, or after `seconds` and three rounds.
    """
    modes = {name: model.training for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        with torch.inference_mode():
            for model in models.values():
                # Caches and allocators warm up.
                time_ms(model.eval(), images)
            start = time.monotonic()
            for i in range(repeats):
                if i >= 3 and time.monotonic() - start > seconds:
                    break
                for name, model in models.items():
                    times[name].append(time_ms(model, images))
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {name: statistics.median(values) for name, values in times.items()}


def time_ms(model: nn.Module, images: Tensor) -> float:
    """Milliseconds of one forward pass, until the device is done."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return (time.perf_counter() - start) * 1e3


def result_table(summary: Mapping[str, Any]) -> "Table":
    """Teacher beside compressed model, from the fields of `summary.json`."""
    from rich.table import Table

    budget = summary["budget"]
    budgets = budget if isinstance(budget, Mapping) else {summary["metric"]: budget}
    asked = " and ".join(f"{fraction:g} of {metric}" for metric, fraction in budgets.items())
    title = f"{summary['model']} on {summary['data']}, budget {asked}"
    # Wide enough that the title stays on one line.
    table = Table(title=title, min_width=len(title))
    for name in ("", "teacher", "compressed", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    before, after = summary["teacher_top1"], summary["final_top1"]
    table.add_row("top-1 (%)", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
    for label, key in (("MACs", "macs"), ("parameters", "params")):
        dense, final = summary[f"dense_{key}"], summary[f"final_{key}"]
        table.add_row(label, _count(dense), _count(final), f"{final / dense:.4f}")
    for entry in summary.get("latency", ()):
        dense, final = entry["teacher_ms"], entry["compressed_ms"]
        label = f"latency, batch {entry['batch']} (ms)"
        table.add_row(label, f"{dense:.2f}", f"{final:.2f}", f"{final / dense:.2f}")
    return table


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def draw_structure(structure: "Structure", dense: "Structure", path: Path, title: str) -> None:
    """Write a PNG: one row per block, what is kept in colour, what is removed in grey.

    `dense` is the structure of the uncompressed model; it says how many heads, dims and neurons there were.
    """
    from uvc.picture import structure_figure

    figure = structure_figure(structure, dense, title)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    os.replace(part, path)

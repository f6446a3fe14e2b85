"""The log of a run: `log.jsonl`, TensorBoard events, trackers and progress."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uvc.io.files import _plain
from uvc.training.trackers import Trackers

SHOWN = ("loss", "soft_cost", "hard_cost", "images_s")  # of a step's scalars, before any others
MOST_SHOWN = 4


class RunLog:
    """Writes `out/log.jsonl` (one JSON line per logged step) and TensorBoard events, and shows progress.

    On a terminal progress is a bar; elsewhere it is a plain line at about every tenth of a phase. With
    `out=None` nothing is written, with `progress=False` nothing is shown. A resumed run appends to its log.

    trackers: "wandb", "mlflow", or both. What they get is counted in steps of the whole run.
    """

    def __init__(self, out: Path | None, progress: bool = False, trackers: Sequence[str] = ()) -> None:
        self._phase, self._step, self._total, self._tenth = "", 0, 0, 0
        self._first: int | None = None  # the first step of this phase that was logged here
        self._start = time.monotonic()
        self._ends: dict[str, int] = {}  # steps of each phase so far, in the order of time
        self._file = self._events = self._progress = self._task = self._console = None
        self._trackers = Trackers(trackers)
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter

            out = Path(out)
            out.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(out / "log.jsonl")
            if trackers:
                self._ends = _ends(out / "log.jsonl")
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
        self._first = None
        self._start = time.monotonic()
        if self._console is not None and self._console.is_terminal:
            self._start_bar()

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Tell trackers the settings of the run."""
        self._trackers.configure(settings)

    def step(self, step: int, **scalars: float) -> None:
        """Log the scalars of one step, counted from 0 within the phase, and advance the progress to it."""
        self._first = step if self._first is None else self._first
        self._step = step + 1
        self._write({"phase": self._phase, "step": step, **scalars})
        self._draw(scalars, step)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._step, figures=_figures(scalars))
        elif self._console is not None and self._new_tenth():
            seconds = time.monotonic() - self._start
            # A resumed phase begins in its middle.
            left = seconds * (self._total - self._step) / max(self._step - self._first, 1)
            self._console.print(
                f"{self._phase:<10} {self._step:>6}/{self._total}  {seconds:5.0f} s, {left:.0f} s left  "
                f"{_figures(scalars)}",
                soft_wrap=True,
            )

    def say(self, line: str) -> None:
        """Show a line, where progress is shown."""
        if self._console is not None:
            self._console.print(line, soft_wrap=True)

    def note(self, **fields: Any) -> None:
        """Write one JSON line that is no step, such as the validation accuracy of an epoch."""
        self._write({"phase": self._phase, **fields})
        numbers = {
            name: value
            for name, value in fields.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self._draw(numbers, self._step)

    def _draw(self, scalars: Mapping[str, float], step: int) -> None:
        named = {f"{self._phase}/{name}": value for name, value in scalars.items()}
        for name, value in named.items() if self._events is not None else ():
            self._events.add_scalar(name, value, step)
        self._ends[self._phase] = max(self._step, self._ends.get(self._phase, 0))
        phases = list(self._ends)
        before = sum(self._ends[phase] for phase in phases[: phases.index(self._phase)])
        if named:
            self._trackers.log(named, before + step)

    def close(self) -> None:
        """Flush and close the files; calling it twice is fine."""
        self._end_bar()
        self._trackers.close()
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


def _ends(path: Path) -> dict[str, int]:
    """How many steps of each phase a log has."""
    found: dict[str, int] = {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if "step" in line:
            found[line["phase"]] = max(line["step"] + 1, found.get(line["phase"], 0))
    return found


def _figures(scalars: Mapping[str, float]) -> str:
    """What progress shows of a step."""
    names = sorted(scalars, key=lambda name: SHOWN.index(name) if name in SHOWN else len(SHOWN))
    return "  ".join(
        f"{scalars[name]:,.0f} images/s" if name == "images_s" else f"{name} {scalars[name]:.4g}"
        for name in names[:MOST_SHOWN]
    )


class Rate:
    """Images per second between two readings."""

    def __init__(self) -> None:
        self._images, self._start = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """So many more have been trained on."""
        self._images += images

    def read(self) -> float:
        """Since the last reading, or since this was made."""
        images, start = self._images, self._start
        self._images, self._start = 0, time.perf_counter()
        return images / max(self._start - start, 1e-9)

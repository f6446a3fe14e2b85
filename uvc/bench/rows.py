"""One measured row and its CSV: append-only, one file per suite in a folder per device."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path

import torch

from uvc import environment
from uvc.bench.ceilings import Ceilings
from uvc.bench.roofline import Work
from uvc.bench.timing import Timing, ratio


@dataclass(frozen=True)
class Row:
    """One variant of one group. What every field means and its unit stand in bench/README.md."""

    date: str
    suite: str
    model: str
    what: str
    variant: str
    backend: str
    dtype: str
    threads: int
    batch: int
    keep: float
    ms: float
    p20: float
    p80: float
    rounds: int
    timer: str
    speedup: float
    noise: float
    speedup_best: float
    cap: float
    cap_fraction: float
    gflop: float
    mbyte: float
    gflop_per_s: float
    gbyte_per_s: float
    peak_gflop_per_s: float
    peak_gbyte_per_s: float
    roofline: float
    images_per_s: float
    peak_mib: float
    standing_mib: float
    speedup_compacted: float
    noise_compacted: float
    error: float
    device: str
    commit: str
    versions: str

    @property
    def key(self) -> tuple:
        """What must be equal for two rows to measure the same thing."""
        return (
            self.suite, self.model, self.what, self.variant, self.backend, self.dtype, self.threads,
            self.batch, self.keep,
        )  # fmt: skip


# What the others of a group are compared with: the first of these that the group has.
BASES = ("dense", "plain_torch")
TYPES = {column.name: column.type for column in fields(Row)}
MISSING = math.nan


@dataclass(frozen=True)
class Group:
    """One group of variants, as measured; `rows` follow once the ceilings are known.

    works, backends, peaks, standing: of each variant in `timings`. "on_the_fly/triton" is the variant before
    the slash, by that backend. `error`: the worst difference that the correctness gate saw. `images`: whether
    a call serves `batch` images.
    """

    suite: str
    model: str
    what: str
    dtype: torch.dtype
    batch: int
    keep: float
    device: torch.device
    timings: Mapping[str, Timing]
    works: Mapping[str, Work]
    backends: Mapping[str, str]
    peaks: Mapping[str, float] = field(default_factory=dict)
    standing: Mapping[str, float] = field(default_factory=dict)
    error: float = MISSING
    images: bool = True
    threads: int = field(default_factory=torch.get_num_threads)


def make_rows(group: Group, ceilings: Ceilings) -> list[Row]:
    """A row per variant; speed-ups refer to the base, `speedup_best` to the faster of it and `compiled`."""
    timings, works = group.timings, group.works
    dense = next(name for name in BASES if name in timings)
    base, floor = timings[dense], works[dense].floor_ms(ceilings)
    best = min((timings[name] for name in (dense, "compiled") if name in timings), key=lambda t: t.ms)
    rows = []
    for name, timing in timings.items():
        work = works[name]
        speedup, noise = ratio(base, timing)
        speedup_best = speedup if best is base else ratio(best, timing)[0]
        compacted = timings.get("compacted")
        beside = (MISSING, MISSING) if compacted is None else ratio(compacted, timing)
        cap = floor / work.floor_ms(ceilings)
        rows.append(
            Row(
                date=date.today().isoformat(),
                suite=group.suite,
                model=group.model,
                what=group.what,
                variant=name.partition("/")[0],
                backend=group.backends.get(name, "torch"),
                dtype=str(group.dtype).removeprefix("torch."),
                threads=group.threads if group.device.type == "cpu" else 0,
                batch=group.batch,
                keep=group.keep,
                ms=timing.ms,
                p20=timing.percentile(0.2),
                p80=timing.percentile(0.8),
                rounds=len(timing.samples),
                timer=timing.timer,
                speedup=speedup,
                noise=noise,
                speedup_best=speedup_best,
                cap=cap,
                cap_fraction=speedup_best / cap,
                gflop=work.flops / 1e9,
                mbyte=work.bytes / 1e6,
                gflop_per_s=work.flops / (1e6 * timing.ms),
                gbyte_per_s=work.bytes / (1e6 * timing.ms),
                peak_gflop_per_s=ceilings.gflop_per_s,
                peak_gbyte_per_s=ceilings.gbyte_per_s,
                roofline=work.floor_ms(ceilings) / timing.ms,
                images_per_s=1e3 * group.batch / timing.ms if group.images else MISSING,
                peak_mib=group.peaks.get(name, MISSING),
                standing_mib=group.standing.get(name, MISSING),
                speedup_compacted=beside[0],
                noise_compacted=beside[1],
                error=group.error,
                device=environment.device_name(group.device),
                commit=environment.commit(),
                versions=environment.versions_line(),
            )
        )
    return rows


def append(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Adds each row to `folder`/<device>/<suite>.csv, with a header where the file is new."""
    touched: dict[Path, None] = {}
    for row in rows:
        path = folder / environment.slug(row.device) / f"{row.suite}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(TYPES)
            writer.writerow(_text(getattr(row, name)) for name in TYPES)
        touched[path] = None
    return list(touched)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return str(value)


def read(path: Path) -> list[Row]:
    """The rows of a CSV; ValueError, in one line that names the file, for anything else."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if set(TYPES) - set(reader.fieldnames or ()):
                lacking = ", ".join(sorted(set(TYPES) - set(reader.fieldnames or ())))
                raise ValueError(f"{path} is not a CSV of benchmark rows: it lacks the columns {lacking:.80}")
            return [_row(path, reader.line_num, record) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _row(path: Path, line: int, record: Mapping[str, str]) -> Row:
    try:
        values = {
            name: (float(record[name] or "nan") if kind is float else kind(record[name]))
            for name, kind in TYPES.items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"line {line} of {path} is not a benchmark row: {error}") from None
    return Row(**values)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each device and key, in the order in which they first appeared."""
    last: dict[tuple, Row] = {}
    for row in rows:
        last[row.device, row.key] = row
    return list(last.values())


def labelled(row: Row) -> str:
    """The variant, with its backend where that is not torch."""
    return row.variant if row.backend == "torch" else f"{row.variant}/{row.backend}"

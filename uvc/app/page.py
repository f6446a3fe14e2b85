"""`uvc report --html`: finished runs as one page that needs no other file and no network.

What a run folder does not hold is said on the page. All that comes from files is escaped by the template.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from torch import nn

from uvc.app.charts import Line, Point, Share, curves, scatter, shares
from uvc.app.page_template import PAGE
from uvc.app.run_dir import COMPACT, OPTIONS, read_json, read_summary
from uvc.app.summary import count_text
from uvc.costs import block_costs, counts, prices
from uvc.io.drawing import structure_picture
from uvc.io.files import write_text
from uvc.io.serialization import load
from uvc.structure import Structure

NONE = "not recorded"


@dataclass(frozen=True)
class Run:
    """What the page shows of one run folder; `missing` says what could not be had."""

    number: int
    folder: str
    quoted: str
    summary: Mapping[str, Any]
    rows: Sequence[tuple[str, str, str, str]]
    pictures: Sequence[tuple[str, Markup, str]]
    charts: Sequence[tuple[str, Markup]]
    compact: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]]
    missing: Sequence[str]


def write_page(folders: Sequence[Path], to: Path) -> None:
    """Write the page of these run folders to a file, whole or not at all; ValueError without a summary."""
    summaries = [read_summary(folder) for folder in folders]
    runs = [_run(i + 1, f, s) for i, (f, s) in enumerate(zip(folders, summaries, strict=True))]
    accuracy, notes = [], []
    for title, read in (("share of the MACs", _cost), ("milliseconds, batch 1", _latency)):
        found = [(run, *read(run.summary)) for run in runs]
        points = _points([(run.number, "teacher", before) for run, _, before in found], ring=True)
        after = _points([(run.number, "compressed", at) for run, at, _ in found])
        if after:
            accuracy.append((f"Top-1 over {title}", scatter(points + after, title, "top-1 (%)")))
        if len(after) < len(runs):
            notes.append(f"Top-1 over {title}: {len(runs) - len(after)} of {len(runs)} runs do not say it.")
    environment = Environment(autoescape=True)
    text = environment.from_string(PAGE).render(runs=runs, accuracy=accuracy, notes=notes)
    try:
        write_text(to, text)
    except OSError as error:
        raise ValueError(f"--html: {error}; name another file") from None


def _number(value: object) -> float | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


Place = tuple[float | None, float | None]  # cost or milliseconds, and top-1


def _points(places: Sequence[tuple[int, str, Place]], ring: bool = False) -> list[Point]:
    known = [(number, what, at) for number, what, at in places if None not in at]
    return [Point(number - 1, f"run {number}, {what}", *at, ring) for number, what, at in known]


def _cost(summary: Mapping[str, Any]) -> tuple[Place, Place]:
    """The compressed model's place, and its teacher's."""
    after, before = (_number(summary.get(f"{name}_top1")) for name in ("final", "teacher"))
    return (_number(summary.get("macs_ratio")), after), (1.0, before)


def _latency(summary: Mapping[str, Any]) -> tuple[Place, Place]:
    one = next((e for e in summary.get("latency") or () if e.get("batch") == 1), {})
    after, before = (_number(summary.get(f"{name}_top1")) for name in ("final", "teacher"))
    return (_number(one.get("compressed_ms")), after), (_number(one.get("teacher_ms")), before)


def _run(number: int, folder: Path, summary: Mapping[str, Any]) -> Run:
    missing: list[str] = []
    pictures = _pictures(folder, summary, missing)
    charts = _search(folder, missing)
    options = _optional(folder / OPTIONS, "the options of the run", missing) or {}
    compact = _compact(_optional(folder / COMPACT, None, missing))
    facts = [(name, _text(summary.get(name))) for name in ("data", "budget", "metric", "seed", "steps")]
    facts += [("recipe", _text(options.get("recipe")))]
    facts += [(name, _text(summary.get(name))) for name in ("precision", "device", "processes", "seconds")]
    facts += [(name, _text(version)) for name, version in (summary.get("versions") or {}).items()]
    if not summary.get("versions"):
        missing.append("versions of the packages")
    folder = str(folder)
    return Run(
        number, folder, repr(folder), summary, _rows(summary), pictures, charts, compact, facts, missing
    )


def _compact(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What `uvc compact` measured; nothing where it was not run."""
    if found is None:
        return []
    place = (f"{name} {_text(found.get(name))}" for name in ("batch", "threads"))
    forms = found.get("forms")
    rows = [("measured on", ", ".join([_text(found.get("device")), *place]))]
    rows.append(
        ("form of each block's heads", ", ".join(map(str, forms)) if isinstance(forms, list) else NONE)
    )
    rows.append(("MACs kept", _count(_number(found.get("kept_macs")))))
    for label, key, text in (("MACs executed", "executed_macs", _count), ("milliseconds", "ms", _fixed)):
        pair = found.get(key) if isinstance(found.get(key), dict) else {}
        said = (f"{text(_number(pair.get(when)))} {when}" for when in ("before", "after"))
        rows.append((label, ", ".join(said)))
    return rows


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, teacher, compressed, difference or ratio."""
    before, after = _number(summary.get("teacher_top1")), _number(summary.get("final_top1"))
    delta = NONE if before is None or after is None else f"{after - before:+.2f}"
    rows = [("top-1 (%)", _fixed(before), _fixed(after), delta)]
    for label, key in (("MACs", "macs"), ("parameters", "params")):
        dense, final = _number(summary.get(f"dense_{key}")), _number(summary.get(f"final_{key}"))
        rows.append((label, *map(_count, (dense, final)), _ratio(final, dense)))
    for row in summary.get("budgets") or ():
        label, cost = f"top-1 at budget {_text(row.get('budget'))} (%)", _number(row.get("macs_ratio"))
        at = _number(row.get("final_top1"))
        rows.append((label, _fixed(before), _fixed(at), f"{_ratio(cost, 1.0)} of the MACs"))
    for entry in summary.get("latency") or ():
        dense, final = _number(entry.get("teacher_ms")), _number(entry.get("compressed_ms"))
        label = f"latency, batch {entry.get('batch')} (ms)"
        rows.append((label, *map(_fixed, (dense, final)), _ratio(final, dense)))
    return rows


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _count(value: float | None) -> str:
    return NONE if value is None else count_text(value)


def _ratio(part: float | None, whole: float | None) -> str:
    return NONE if part is None or not whole else f"× {part / whole:.3f}"


def _text(value: object) -> str:
    if value is None:
        return NONE
    return (
        f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )


def _optional(path: Path, what: str | None, missing: list[str]) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except ValueError:
        if what is not None:
            missing.append(f"{what} ({path.name})")
        return None


def _pictures(folder: Path, summary: Mapping[str, Any], missing: list[str]) -> list[tuple[str, Markup, str]]:
    """Title, picture and legend: what each block keeps, and what it costs."""
    try:
        kept = Structure.from_json(json.dumps(summary.get("structure")))
        model = load(folder)
        dense = Structure.dense(model)
        picture = Markup(structure_picture(kept, dense))
    except ValueError as error:
        missing.append(f"the picture of the structure ({error})")
        return []
    legend = "Blue: q/k dims, orange: v dims, green: neurons; grey: removed."
    pictures = [("What each block keeps", picture, legend)]
    try:
        rows = _shares(model, kept, dense)
    except ValueError as error:
        missing.append(f"the MACs of each block ({error})")
        return pictures
    legend = "Blue: attention, green: MLP, rest: patch embedding and head; grey: removed."
    pictures.append(("Where the MACs go", shares(rows, "MACs of each block"), legend))
    if rows := _times(summary.get("block_ms")):
        legend = (
            "Blue: attention, green: MLP, then norms and sums; grey: saved. One image, on the run's device."
        )
        pictures.append(("Where the milliseconds go", shares(rows, "Milliseconds of each block"), legend))
    else:
        missing.append("the milliseconds of each block")
    return pictures


def _times(found: object) -> list[Share]:
    """The milliseconds of each block, compressed and of the teacher; none unless all of them are numbers."""
    if not isinstance(found, Mapping):
        return []
    sides = [found.get(name) for name in ("compressed", "teacher")]
    if not all(isinstance(side, list) and side for side in sides) or len(sides[0]) != len(sides[1]):
        return []
    blocks = [block for side in sides for block in side]
    if not all(isinstance(b, list) and len(b) == 3 and None not in map(_number, b) for b in blocks):
        return []
    return [Share(str(i), *now, sum(was)) for i, (now, was) in enumerate(zip(*sides, strict=True))]


def _shares(model: nn.Module, kept: Structure, dense: Structure) -> list[Share]:
    """The MACs of each block as `kept` and as `dense`, and of what is outside the blocks."""
    after, before = prices(model, "macs", kept), prices(model, "macs", dense)
    count, none = counts(kept), (0,) * len(kept.blocks)
    attn = block_costs(after, count._replace(mlp=none))
    mlp = block_costs(after, count._replace(attn=none))
    whole = block_costs(before, counts(dense))
    rows = [Share(str(i), *row) for i, row in enumerate(zip(attn, mlp, none, whole, strict=True))]
    return [*rows, Share("rest", 0.0, 0.0, after.fixed, before.fixed)]


def _search(folder: Path, missing: list[str]) -> list[tuple[str, Markup]]:
    """Charts of the search: what it cost and should cost, and the multipliers."""
    series: dict[str, list[tuple[float, float]]] = {}
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn when a run was killed
        if not isinstance(line, dict) or line.get("phase") != "search" or _number(line.get("step")) is None:
            continue
        for name, value in line.items():
            if _number(value) is not None:
                series.setdefault(name, []).append((float(line["step"]), float(value)))
    charts = []
    for title, starts in (
        ("Cost and target, shares of the dense cost", ("target", "soft_cost", "hard_cost")),
        ("Multiplier of the budget, z", ("z",)),
        ("Multipliers of the groups, y", ("y_",)),
    ):
        names = [n for n in series if n.startswith(starts) and len(series[n]) > 1]
        if names:
            charts.append((title, curves([Line(n, series[n]) for n in names], "step of the search")))
    if not charts:
        missing.append("curves of the search (log.jsonl)")
    return charts

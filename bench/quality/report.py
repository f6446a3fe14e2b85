"""What the CSV says: means, and 95% intervals of differences paired by seed."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from scipy.stats import t as student

Row = dict[str, str]
OURS = "uvc"


def read_rows(file: Path, version: int) -> list[Row]:
    """Rows of this version, none without the file."""
    if not file.exists():
        return []
    with open(file, newline="") as handle:
        return [row for row in csv.DictReader(handle) if row["version"] == str(version)]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95% interval by Student's t); the width of one value is infinite."""
    if len(values) < 2:
        return values[0], math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(student.ppf(0.975, len(values) - 1)) * error


def paired(rows: Iterable[Row], ours: str, theirs: str, field: str) -> list[float]:
    """ours - theirs for every seed that both have."""
    by = defaultdict(dict)
    for row in rows:
        by[row["arm"]][row["seed"]] = float(row[field])
    return [by[ours][seed] - by[theirs][seed] for seed in sorted(by[ours].keys() & by[theirs].keys())]


def render(rows: list[Row], mode: str) -> str:
    """Markdown: a table per task and budget, the arms in order of their mean accuracy at the end."""
    rows = [row for row in rows if row["mode"] == mode]
    lines = []
    for task in sorted({row["task"] for row in rows}):
        here = [row for row in rows if row["task"] == task]
        dense = [row for row in here if float(row["budget"]) == 1.0]
        for budget in sorted({float(row["budget"]) for row in here} - {1.0}, reverse=True):
            table = [row for row in here if float(row["budget"]) == budget] + dense
            lines += [f"\n### {task}, budget {budget}, equal {mode}\n", *_table(table)]
    return "\n".join(lines).strip() or "no rows yet"


HEAD = (
    "arm",
    "n",
    "before",
    "after",
    "uvc - arm, before",
    "uvc - arm, after",
    "MACs",
    "search s",
    "post s",
    "compute",
)
HEAD += ("latency", "blocks", "heads", "dims", "neurons", "tokens")


def _table(rows: list[Row]) -> list[str]:
    arms = defaultdict(list)
    for row in rows:
        arms[row["arm"]].append(row)
    order = sorted(arms, key=lambda arm: -mean_of(arms[arm], "after_top1"))
    return [line(HEAD), line(["---"] * len(HEAD)), *(line(_cells(arm, arms[arm], rows)) for arm in order)]


def _cells(arm: str, own: list[Row], rows: list[Row]) -> list[str]:
    cells = [arm, str(len(own)), f"{mean_of(own, 'before_top1'):.1f}", f"{mean_of(own, 'after_top1'):.2f}"]
    for field in ("before_top1", "after_top1"):
        differences = paired(rows, OURS, arm, field) if arm != OURS else []
        cells.append("{:+.2f} ± {:.2f}".format(*interval(differences)) if differences else "")
    for field, form in (
        ("macs_ratio", ".3f"),
        ("search_seconds", ".0f"),
        ("post_seconds", ".0f"),
        ("train_compute", ".2f"),
        ("latency_ratio", ".2f"),
        ("off_blocks", ".1f"),
        ("off_heads", ".1f"),
        ("off_dims", ".1f"),
        ("off_neurons", ".1f"),
        ("off_tokens", ".1f"),
    ):
        cells.append(shown(own, field, form))
    return cells


def mean_of(rows: list[Row], field: str) -> float:
    """Mean of a column over the rows that have it; nan without any."""
    values = [float(row[field]) for row in rows if row[field]]
    return statistics.fmean(values) if values else math.nan


def shown(rows: list[Row], field: str, form: str) -> str:
    """The same as a cell, which is empty without any."""
    value = mean_of(rows, field)
    return "" if math.isnan(value) else format(value, form)


def line(cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"

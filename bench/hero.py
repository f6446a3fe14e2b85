"""docs/hero.png, the picture at the head of the README: accuracy and speed over what is kept, from CSV files.

python bench/hero.py [--docs docs]
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from uvc.bench.rows import Row, latest, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
INK, FAINT = "#2b2b2b", "#9a9a96"
TASK = "digits"
ARMS = {
    "uvc": ("UVC", "#3b6fb6", "o"),
    "global_taylor": ("global Taylor, one shot", "#d9822b", "s"),
    "tp_isomorphic": ("torch-pruning, isomorphic", "#8a6d3b", "^"),
    "drop_last_k": ("first blocks only", "#8a5fb0", "v"),
}
VARIANTS = {
    "on_the_fly": ("UVC, skipped on the fly", "#3b6fb6", "o"),
    "compacted": ("compacted", "#3a8f6b", "s"),
    "masked": ("masked by multiplication", "#d9822b", "^"),
}


def accuracy(axes: "Axes", rows: Sequence[dict[str, str]]) -> None:
    """Top-1 over the fraction of MACs kept: solid after post-training, dotted before it."""
    chosen = [row for row in rows if row["task"] == TASK and row["mode"] == "epochs"]
    dense = fmean(float(row["teacher_top1"]) for row in chosen)
    axes.axhline(dense, color=FAINT, linewidth=1.0)
    axes.annotate(
        f"dense {dense:.1f}",
        (0.5, dense),
        (0, 3),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        ha="right",
    )
    for arm, (label, color, marker) in ARMS.items():
        points = defaultdict(list)
        for row in chosen:
            if row["arm"] == arm and float(row["budget"]) < 1:
                points[float(row["budget"])].append(row)
        budgets = sorted(points)
        for field, line, name in (("after_top1", "-", label), ("before_top1", ":", None)):
            means = [fmean(float(row[field]) for row in points[budget]) for budget in budgets]
            axes.plot(
                budgets, means, line, color=color, marker=marker, markersize=5, linewidth=1.6, label=name
            )
    axes.set(
        xlabel="fraction of MACs kept", ylabel="top-1 (%)", title="Accuracy (dotted: before post-training)"
    )


def speed(axes: "Axes", rows: Sequence[Row]) -> None:
    """Training steps as fast as dense ones over what is kept, DeiT-T in float32 on one thread."""
    chosen = [
        row
        for row in rows
        if (row.model, row.what, row.dtype, row.threads)
        == ("deit_tiny_patch16_224", "training", "float32", 1)
    ]
    caps = dict(
        sorted({1.0: 1.0, **{row.keep: row.cap for row in chosen if row.variant == "on_the_fly"}}.items())
    )
    axes.plot(
        list(caps), list(caps.values()), "--", color=FAINT, linewidth=1.2, label="cap: work that is left"
    )
    axes.axhline(1.0, color=FAINT, linewidth=1.0)
    for variant, (label, color, marker) in VARIANTS.items():
        points = sorted((row.keep, row.speedup) for row in chosen if row.variant == variant)
        axes.plot(
            *zip(*points, strict=True), color=color, marker=marker, markersize=5, linewidth=1.6, label=label
        )
    title = f"Speed of a training step, DeiT-T, {chosen[0].device}"
    axes.set(xlabel="fraction of dims and neurons kept", ylabel="times as fast as dense timm", title=title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws both panels."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    with open(ROOT / "bench" / "quality" / "results.csv", newline="") as file:
        quality = list(csv.DictReader(file))
    speeds = latest(
        [row for path in sorted((ROOT / "bench" / "results").rglob("models.csv")) for row in read(path)]
    )
    figure = Figure(figsize=(10.4, 4.0), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracy(left, quality)
    speed(right, speeds)
    for axes in (left, right):
        axes.title.set(fontsize=10, color=INK)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False, loc="best")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.docs / "hero.png", dpi=130)


if __name__ == "__main__":
    main()

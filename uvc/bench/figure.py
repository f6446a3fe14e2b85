"""Speed-up against kept fraction, with the cap drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from uvc.bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#2b2b2b", "#9a9a96"
STYLE = {
    "on_the_fly": ("skipped on the fly", "#3b6fb6", "o"),
    "with_solver": ("on the fly, with the solver", "#7fa7d9", "D"),
    "compacted": ("compacted", "#3a8f6b", "s"),
    "pack_torch": ("pack with torch", "#b08fc7", "v"),
    "torch_pruning": ("torch-pruning", "#8a6d3b", "P"),
    "masked": ("masked by multiplication", "#d9822b", "^"),
    "compiled": ("dense, compiled", "#777777", "x"),
    "converted": ("converted, nothing pruned", "#aaaaaa", "+"),
}


def speedup_figure(rows: Sequence[Row]) -> "Figure":
    """A matplotlib figure of the rows of one model and phase; no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), facecolor="white", layout="constrained")
    draw(figure.add_subplot(), rows)
    return figure


def draw(axes: "Axes", rows: Sequence[Row]) -> None:
    """One panel: a line per variant, bars as wide as the noise band, the cap dashed."""
    first = rows[0]
    threads = f", {first.threads} thread{'s' * (first.threads > 1)}" if first.threads else ""
    axes.set_title(
        f"{first.model}, {first.what}, batch {first.batch}, {first.dtype}\n{first.device}{threads}",
        fontsize=9,
        color=INK,
    )
    caps = dict(sorted({1.0: 1.0, **{r.keep: r.cap for r in rows if r.variant == "on_the_fly"}}.items()))
    axes.plot(list(caps), list(caps.values()), "--", color=FAINT, linewidth=1.2, label="cap")
    axes.axhline(1.0, color=FAINT, linewidth=0.8)
    for variant, (label, color, marker) in STYLE.items():
        for backend in dict.fromkeys(r.backend for r in rows if r.variant == variant):
            points = sorted(
                (r.keep, r.speedup, r.speedup * r.noise)
                for r in rows
                if r.variant == variant and r.backend == backend
            )
            keeps, speedups, bands = zip(*points, strict=True)
            name = label if backend in ("torch", "auto") else f"{label}, {backend}"
            axes.errorbar(
                keeps, speedups, bands, label=name, color=color, marker=marker, markersize=5, linewidth=1.2,
                capsize=2, alpha=1.0 if backend in ("torch", "auto") else 0.6,
            )  # fmt: skip
    axes.set_xlabel("kept fraction of heads' dims and neurons", fontsize=9)
    axes.set_ylabel("times as fast as dense timm", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7.5, frameon=False)

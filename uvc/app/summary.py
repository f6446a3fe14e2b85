"""What a run tells its user: the final table, and the picture of the structure."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uvc.io.files import write_whole
from uvc.io.serialization import load
from uvc.structure import Structure

if TYPE_CHECKING:
    from rich.table import Table


def result_table(summary: Mapping[str, Any]) -> "Table":
    """Teacher beside compressed model, from the fields of `summary.json`."""
    from rich.table import Table

    budget = summary["budget"]
    if isinstance(budget, Mapping):
        asked = " and ".join(f"{fraction:g} of {metric}" for metric, fraction in budget.items())
    else:
        fractions = budget if isinstance(budget, list | tuple) else [budget]
        asked = f"{', '.join(f'{fraction:g}' for fraction in fractions)} of {summary['metric']}"
    title = f"{summary['model']} on {summary['data']}, budget {asked}"
    # Wide enough that the title stays on one line.
    table = Table(title=title, min_width=len(title))
    for name in ("", "teacher", "compressed", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    before, after = summary["teacher_top1"], summary["final_top1"]
    table.add_row("top-1 (%)", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
    for label, key in (("MACs", "macs"), ("parameters", "params")):
        dense, final = summary[f"dense_{key}"], summary[f"final_{key}"]
        table.add_row(label, count_text(dense), count_text(final), f"{final / dense:.4f}")
    for row in summary.get("budgets", ()):
        label, after = f"budget {row['budget']:g}: top-1 (%)", row["final_top1"]
        table.add_row(label, f"{before:.2f}", f"{after:.2f}", f"MACs {row['macs_ratio']:.4f}")
    for entry in summary.get("latency", ()):
        dense, final = entry["teacher_ms"], entry["compressed_ms"]
        label = f"latency, batch {entry['batch']} (ms)"
        table.add_row(label, f"{dense:.2f}", f"{final:.2f}", f"{final / dense:.2f}")
    return table


def count_text(value: float) -> str:
    """A number of MACs or parameters in G, M or k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def draw_structure(structure: Structure, dense: Structure, path: Path, title: str) -> None:
    """Write a PNG: one row per block, what is kept in colour, what is removed in grey.

    `dense` is the structure of the uncompressed model; it says how many heads, dims and neurons there were.
    """
    from uvc.app.plots import structure_figure

    figure = structure_figure(structure, dense, title)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=150))


def draw_run(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `structure.png` from the model and the structure in a run folder."""
    structure = Structure.from_json((folder / "structure.json").read_text())
    title = f"{summary['model']} on {summary['data']}: {summary['macs_ratio']:.1%} of the MACs kept"
    draw_structure(structure, Structure.dense(load(folder)), folder / "structure.png", title)

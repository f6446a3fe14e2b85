"""Pictures and tables in docs and README from the CSV files: no figure there is typed by hand.

    python bench/plot.py [--results bench/results] [--docs docs] [--readme README.md]

Writes docs/bench_<device>.png and the blocks between <!-- bench NAME --> and <!-- /bench NAME --> of
the README and of docs/bench.md. With --check nothing is written; exit code 1 when something would change.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from uvc.bench.figure import draw
from uvc.bench.rows import Row, latest, read
from uvc.bench.table import OPS, SOLVER, solver_shares
from uvc.environment import slug

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "dense": "dense timm",
    "compiled": "dense timm, `torch.compile`",
    "converted": "converted, nothing pruned",
    "on_the_fly": "**skipped on the fly**, full-size weights stay",
    "with_solver": "skipped on the fly, with the solver",
    "compacted": "compacted",
    "pack_torch": "packed by `index_select`, then torch",
    "masked": "masked by multiplication",
    "torch_pruning": "pruned by torch-pruning",
}
MODELS = {
    "deit_tiny_patch16_224": "DeiT-T",
    "deit_small_patch16_224": "DeiT-S",
    "deit_base_patch16_224": "DeiT-B",
}


def load(results: Path) -> list[Row]:
    """The last row of each setting on each device; the order is that of the files."""
    rows = []
    for suite in ("models", "kernels"):
        for path in sorted(results.rglob(f"{suite}.csv")):
            rows += read(path)
    return latest(rows)


def training_table(rows: Sequence[Row], device: str) -> list[str]:
    """DeiT-T at keep 0.5, float32, one thread: every variant."""
    case = ("models", "deit_tiny_patch16_224", "training", 0.5)
    chosen = [
        row
        for row in rows
        if row.device == device
        and (row.suite, row.model, row.what, row.keep) == case
        and (row.dtype, row.threads) in (("float32", 1), ("bfloat16", 0))
    ]
    if not chosen:
        return []
    first = chosen[0]
    commits = ", ".join(sorted({row.commit for row in chosen}))
    threads = f", {first.threads} thread" if first.threads else ""
    out = [
        f"One training step of DeiT-T, batch {first.batch}, {first.dtype}{threads}, half kept, on {device} "
        f"({first.date}, commit {commits}):",
        "",
        "| | ms | times as fast as dense | ± | cap | of cap | as fast as compacted | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    variants = list(NAMES)
    shown = [row for row in chosen if row.variant in variants]
    for row in sorted(shown, key=lambda row: variants.index(row.variant)):
        name = NAMES[row.variant] + ("" if row.backend in ("torch", "auto") else f", {row.backend}")
        out.append(
            f"| {name} | {row.ms:.1f} | {row.speedup:.2f} | {row.noise:.0%} | {row.cap:.2f} | "
            f"{row.cap_fraction:.0%} | {_number(row.speedup_compacted)} | {row.peak_mib:.0f} |"
        )
    shares = {row.variant: share for row, share in solver_shares(chosen)}
    if len(shares) == len(SOLVER):
        usual, highest = (f"{shares[variant]:.1%}" for variant in SOLVER)
        out += [
            "",
            f"The solver's own work is {usual} of such a search step, {highest} where groups die in each.",
        ]
    return out


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _beside(fly: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """The variants that were measured with it."""
    return {row.variant: row for row in rows if row.key[1:3] + row.key[5:] == fly.key[1:3] + fly.key[5:]}


def models_table(rows: Sequence[Row], device: str) -> list[str]:
    """On the fly, compacted and masked, for every model, phase and kept fraction."""
    out = [
        "| model | phase | keep | batch | dtype | threads | on the fly | ± | of cap | compacted | masked |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    chosen = [row for row in rows if row.device == device and row.suite == "models" and row.keep < 1]
    for fly in (row for row in chosen if row.variant == "on_the_fly"):
        beside = _beside(fly, chosen)
        others = [f"{beside[name].speedup:.2f}" if name in beside else "" for name in ("compacted", "masked")]
        backend = "" if fly.backend == "auto" else f", {fly.backend}"
        out.append(
            f"| {MODELS.get(fly.model, fly.model)} | {fly.what} | {fly.keep:g} | {fly.batch} | {fly.dtype} | "
            f"{fly.threads or ''} | {fly.speedup:.2f}{backend} | {fly.noise:.0%} | {fly.cap_fraction:.0%} | "
            f"{' | '.join(others)} |"
        )
    return out if len(out) > 2 else []


def layers_table(rows: Sequence[Row], device: str) -> list[str]:
    """Each kernel at keep 0.5 beside the other variants."""
    names = ("compiled", "masked", "pack_torch", "compacted")
    out = [
        f"| layer | batch | dtype | backend | ms | on the fly | ± | of cap | of roof | {' | '.join(names)} |",
        "|---" * (9 + len(names)) + "|",
    ]
    chosen = [row for row in rows if row.device == device and row.suite == "kernels" and row.keep == 0.5]
    for fly in (row for row in chosen if row.variant == "on_the_fly" and row.backend != "reference"):
        beside = _beside(fly, chosen)
        others = [f"{beside[name].speedup:.2f}" if name in beside else "" for name in names]
        out.append(
            f"| {fly.model} {fly.what} | {fly.batch} | {fly.dtype} | {fly.backend} | {fly.ms:.2f} | "
            f"{fly.speedup:.2f} | {fly.noise:.0%} | {fly.cap_fraction:.0%} | {fly.roofline:.0%} | "
            f"{' | '.join(others)} |"
        )
    return out if len(out) > 2 else []


def ops_table(rows: Sequence[Row], device: str) -> list[str]:
    """Each op over all layers, at every kept fraction."""
    out = [
        "| model | op | keep | dtype | backend | ms | torch, ms | times as fast | ± | cap | GB/s | of roof |",
        "|---" * 12 + "|",
    ]
    chosen = [row for row in rows if row.device == device and row.variant in OPS]
    plain = {row.key[:3] + row.key[5:]: row for row in chosen if row.variant == "plain_torch"}
    for r in (row for row in chosen if row.variant == "kernel" and row.backend != "reference"):
        out.append(
            f"| {r.model} | {r.what} | {r.keep:g} | {r.dtype} | {r.backend} | {r.ms:.2f} | "
            f"{plain[r.key[:3] + r.key[5:]].ms:.2f} | {r.speedup:.2f} | {r.noise:.0%} | {r.cap:.2f} | "
            f"{r.gbyte_per_s:.1f} | {r.roofline:.0%} |"
        )
    return out if len(out) > 2 else []


BLOCKS: dict[str, Callable[[Sequence[Row], str], list[str]]] = {
    "training": training_table,
    "models": models_table,
    "layers": layers_table,
    "ops": ops_table,
}


def block(name: str, rows: Sequence[Row]) -> str:
    """The text of one block: its table for every device."""
    parts = []
    for device in dict.fromkeys(row.device for row in rows):
        if lines := BLOCKS[name](rows, device):
            parts.append("\n".join(lines if name == "training" else [f"{device}:", "", *lines]))
    return "\n\n".join(parts) or "Nothing was measured yet."


def filled(text: str, rows: Sequence[Row]) -> str:
    """`text` with every block between its markers written anew; ValueError on an unknown name."""

    def write(match: re.Match) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"<!-- bench {match[2]} -->: no such block; there are {', '.join(BLOCKS)}")
        return f"{match[1]}\n{block(match[2], rows)}\n{match[3]}"

    return re.sub(r"(<!-- bench (\w+) -->).*?(<!-- /bench \2 -->)", write, text, flags=re.S)


def figure(rows: Sequence[Row], device: str):
    """Training and inference of every model on one device."""
    from matplotlib.figure import Figure

    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.device == device and row.suite == "models":
            panels.setdefault((row.what, row.model, row.dtype, row.threads, row.batch), []).append(row)
    whole = [p for p in panels.values() if len({row.keep for row in p}) > 1]
    if not whole:
        return None
    figure = Figure(figsize=(5.6 * len(whole), 4.4), facecolor="white", layout="constrained")
    for i, panel in enumerate(whole):
        draw(figure.add_subplot(1, len(whole), i + 1), panel)
    return figure


def picture(device: str) -> str:
    """The file that shows the models on one device."""
    return f"bench_{slug(device)}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, or checks, everything; 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 when a table is not that of the CSV"
    )
    options = parser.parse_args(arguments)
    rows, stale = load(options.results), []
    for path in (options.readme, options.docs / "bench.md"):
        if not path.exists():
            continue
        old = path.read_text()
        if (new := filled(old, rows)) != old:
            stale.append(path)
            if not options.check:
                path.write_text(new)
    if not options.check:
        for device in dict.fromkeys(row.device for row in rows):
            if drawn := figure(rows, device):
                drawn.savefig(options.docs / picture(device), dpi=110)
    for path in stale:
        print(f"{'differs from the CSV' if options.check else 'written'}: {path}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

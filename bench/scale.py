"""docs/scale.md: what training on ImageNet costs, dense and with UVC, from the rows of bench/results.

A section for every device, number of threads and dtype that has rows. The limits are computed.

python bench/scale.py [--results bench/results] [--out docs/scale.md]
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from uvc.bench.ceilings import Ceilings
from uvc.bench.roofline import Kept, Shape, everything, model_work
from uvc.bench.rows import Row, latest, read
from uvc.recipes import default

ROOT = Path(__file__).resolve().parents[1]
IMAGES, EPOCHS, KEEP = 1_281_167, 300, 0.5
GPUS = (1, 8, 64)
# While the cost shrinks from 1 to KEEP by equal factors it is (KEEP - 1) / ln KEEP on average.
DENSE_SHARE = ((KEEP - 1) / math.log(KEEP) - KEEP) / (1 - KEEP)
# Measured elsewhere on one NVIDIA H200: a large bf16 product and a large copy. Only limits follow from them.
LIMIT = Ceilings(790e3, ((1 << 40, 4300.0),))
MODELS = {
    "deit_tiny_patch16_224": ("DeiT-T", 192, 256),
    "deit_small_patch16_224": ("DeiT-S", 384, 256),
    "deit_base_patch16_224": ("DeiT-B", 768, 128),
}


class Seconds(NamedTuple):
    """Per image: a dense training step, one at the kept fraction, the teacher's forward pass."""

    dense: float
    kept: float
    teacher: float

    def recipe(self) -> float:
        """Of an image of UVC's recipe, without the teacher: see FORMULA."""
        c = default()
        epochs = c.warmup_epochs + c.search_epochs + c.post_epochs
        start, end = c.solver.anneal
        middle = (end - start) * (DENSE_SHARE * self.dense + (1 - DENSE_SHARE) * self.kept)
        search = start * self.dense + middle + (1 - end) * self.kept
        spent = c.warmup_epochs * self.dense + c.search_epochs * search + c.post_epochs * self.kept
        return spent / epochs

    def hours(self) -> tuple[float, float, float]:
        """Of 300 epochs of ImageNet on one device: dense, UVC with a teacher, UVC without."""
        seen = IMAGES * EPOCHS / 3600
        recipe = self.recipe()
        return seen * self.dense, seen * (recipe + self.teacher), seen * recipe


FORMULA = """\
An image costs `d` seconds in a dense training step, `k` in a step at half of the heads' dims and neurons
(with the solver beside it where that was measured), and `t` in the teacher's forward pass. UVC's recipe
spends {warmup} of {epochs} epochs on warming up (`d`), {search} on the search and {post} on training what is
left (`k`). In the search the cost stays at `d` for {start:.0%} of the steps, goes to `k` until {end:.0%} by
equal factors, on average {dense:.2f} d + {kept:.2f} k, and stays there; skipped halves would make it
cheaper. So

    dense = 1,281,167 images x 300 epochs x d
    UVC   = 1,281,167 images x 300 epochs x (({warmup} d + {search} s + {post} k) / {epochs} + t)
            s = {start:g} d + {middle:g} ({dense:.2f} d + {kept:.2f} k) + {rest:g} k

The recipe is stretched to the 300 epochs of the dense run, so that both see equally many images. Without a
teacher `t` is 0. Several devices are counted as so many times faster than one: no run on several has been
measured, and exchanging gradients only adds to it.
"""


def page(results: Path) -> str:
    """The whole page."""
    c = default()
    start, end = c.solver.anneal
    formula = FORMULA.format(
        warmup=c.warmup_epochs,
        search=c.search_epochs,
        post=c.post_epochs,
        epochs=c.warmup_epochs + c.search_epochs + c.post_epochs,
        start=start,
        end=end,
        middle=end - start,
        rest=1 - end,
        dense=DENSE_SHARE,
        kept=1 - DENSE_SHARE,
    )
    rows = []
    for path in sorted(results.rglob("models.csv")):
        rows += read(path)
    rows = latest(rows)
    parts = [
        "# What training on ImageNet costs",
        "Written by `python bench/scale.py` from the rows of `bench/results`; no figure was typed by hand.",
        formula.rstrip(),
    ]
    for setting in dict.fromkeys((row.device, row.threads, row.dtype) for row in rows):
        parts += measured([row for row in rows if (row.device, row.threads, row.dtype) == setting])
    parts += limits()
    return "\n\n".join(parts) + "\n"


def seconds(rows: Sequence[Row], model: str) -> tuple[Row, Seconds] | None:
    """What was measured of one model at KEEP: the row on the fly, and seconds per image."""

    def one(what: str, variant: str) -> Row | None:
        found = [r for r in rows if (r.model, r.what, r.variant, r.keep) == (model, what, variant, KEEP)]
        return min(found, key=lambda row: row.ms / row.batch, default=None)

    dense, fly, teacher = one("training", "dense"), one("training", "on_the_fly"), one("inference", "dense")
    if dense is None or fly is None or teacher is None:
        return None
    kept = one("training", "with_solver") or fly
    return fly, Seconds(*(1e-3 * row.ms / row.batch for row in (dense, kept, teacher)))


def measured(rows: Sequence[Row]) -> list[str]:
    """The section of one device, number of threads and dtype, from its images per second."""
    first = rows[0]
    on_gpu = first.threads == 0
    unit = "GPUs" if on_gpu else "such devices"
    threads = "" if on_gpu else f", {first.threads} thread{'s' * (first.threads > 1)}, {first.dtype}"
    lines = [
        f"## From what was measured on {first.device}{threads}",
        f"Images per second were measured ({first.date}); hours follow by the formula: dense / UVC / UVC "
        "without a teacher.",
    ]
    table = [
        f"| model | images/s dense | images/s at keep {KEEP:g} | "
        + " | ".join(f"hours on {n} {unit if n > 1 else unit[:-1]}" for n in GPUS)
        + " |",
        "|---" * (3 + len(GPUS)) + "|",
    ]
    for model, (name, _, _) in MODELS.items():
        if (found := seconds(rows, model)) is None:
            continue
        _, s = found
        table.append(
            f"| {name} | {1 / s.dense:,.4g} | {1 / s.kept:,.4g} | {' | '.join(hours(s, n) for n in GPUS)} |"
        )
    if len(table) == 2:
        return []
    if not on_gpu:
        lines[1] += " Nobody would train like this: it only says what the measured rates amount to."
    return [*lines, "\n".join(table)]


def limits() -> list[str]:
    """The section that holds limits and no measurement."""
    table = [
        "| model | images/s dense, at most | at keep 0.5, at most | "
        + " | ".join(f"hours on {n} GPU{'s' * (n > 1)}, at least" for n in GPUS)
        + " |",
        "|---" * (3 + len(GPUS)) + "|",
    ]
    for name, dim, batch in MODELS.values():
        shape = Shape(batch, 197, dim, dim // 64, 64, 4 * dim, stem=196 * 768 * dim)
        whole = [everything(shape)] * 12
        half = [Kept(*(round(KEEP * n) for n in everything(shape)))] * 12
        s = Seconds(
            *(
                1e-3 * model_work(shape, kept, 2, training).floor_ms(LIMIT) / batch
                for kept, training in ((whole, True), (half, True), (whole, False))
            )
        )
        table.append(
            f"| {name} | {1 / s.dense:,.0f} | {1 / s.kept:,.0f} | {' | '.join(hours(s, n) for n in GPUS)} |"
        )
    return [
        "## Limits on one NVIDIA H200: computed, not measured",
        "No implementation is faster than this on a GPU that multiplies bf16 at "
        f"{LIMIT.gflop_per_s / 1e3:.0f} TFLOP/s and copies at {LIMIT.gbyte_per_s / 1e3:.1f} TB/s: every pass "
        "of `uvc/bench/work.py` at its ceiling. Real steps take longer; how much, rows of a GPU in "
        "bench/results say once there are any. "
        "Hours: dense / UVC / UVC without a teacher.",
        "\n".join(table),
    ]


def hours(s: Seconds, devices: int) -> str:
    """Dense, UVC, and UVC without a teacher, on so many devices."""
    each = (value / devices for value in s.hours())
    return " / ".join(f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in each)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scale.md")
    options = parser.parse_args(arguments)
    options.out.write_text(page(options.results))
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

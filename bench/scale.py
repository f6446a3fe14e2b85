"""docs/scale.md: what training on ImageNet costs, dense and with UVC, from the rows of bench/results.

A section for every device, number of threads and dtype that has rows. The limits are computed.

python bench/scale.py [--results bench/results] [--out docs/scale.md]
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch

from uvc import Structure, convert, cost
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
teacher `t` is 0. Several devices are counted as so many times faster than one; the last section adds the
exchange of gradients.
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
    parts += processes()
    parts += pipeline(results)
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
        "of `uvc/bench/work.py` at its ceiling. Real steps take longer: at keep 0.5 an H100 reached "
        "16.8, 9.8 and 4.3 thousand images/s ([facts](facts.md#on-a-gpu)). "
        "Hours: dense / UVC / UVC without a teacher.",
        "\n".join(table),
    ]


SEVERAL = """\
The recipe's global batch of {batch:,} images is shared by the GPUs of nodes of {node}. Computing is at the
limit above, so reducing weighs more here than it does beside real steps. What is sent is 4 bytes for each
kept parameter, as tests count it ([distributed.md](distributed.md)). A node reduces in a ring, then nodes do,
each GPU for its share; a message takes {latency:g} us; two thirds of the computing hide as much reducing."""
ENDS = """\
The batch ends the scaling: 512 GPUs compute 2 images each, in a tenth of the time that reducing takes. Where
reducing is the step, keeping half takes half to two thirds of the dense step; a batch that grows with the
GPUs hides it again, as on 8. The search adds one reduction of less than 1 KB, which the forward pass hides,
and at gate steps 2 numbers for each block, in the last bucket."""
LOSSES = """\
Simulated: {runs} runs of {length:g} hours of computing. Failures come at random, once in {hours:,.0f} GPU
hours (published of Llama 3's training); each costs what was computed since the last checkpoint and
{restart:g} minutes to start again (assumed). Writing is off the training thread and costs no time here. And
2,000 steps, whose time varies by {jitter:.0%} (assumed, normal, of each GPU apart); in the last column one
GPU of {rare:,} runs at {slow:.0%} of its speed (assumed). All wait for the slowest."""
PIPELINE = """\
A core decodes, crops, flips and normalises {rate:,.0f} JPEG images of 500 x 375 pixels ({kbyte:.0f} KB) per
second for a model of 224 pixels ({policy:,.0f} with the policy rand-m9), by `python bench/images.py` on
{device}, in processor time. What a GPU at the limit above takes:"""
READING = """\
Slower steps need fewer in proportion; where a GPU has fewer, its steps wait for their images. Keeping half
makes them wait sooner, as a step takes less and its images do not. `--teacher-cache` does not help here,
smaller images do."""


class Links(NamedTuple):
    """GB/s and microseconds of one message, one way: of a GPU within its node of 8, and out of it."""

    name: str
    inside: float
    outside: float
    latency: float = 5.0


# As published: NVLink 4 has 450 GB/s each way; NDR InfiniBand 400 Gbit/s for a GPU; Ethernet for a node.
LINKS = (Links("NVLink, InfiniBand NDR", 450.0, 50.0), Links("NVLink, 100 Gbit/s Ethernet", 450.0, 12.5 / 8))
NODE, BATCH, COUNTS = 8, 1024, (8, 64, 512)
# As published of Llama 3's training: 419 unexpected interruptions of 16,384 GPUs in 54 days.
GPU_HOURS_PER_FAILURE = 16384 * 54 * 24 / 419
RESTART = 5.0  # minutes to start again (assumed)
BETWEEN = (10.0, 60.0)  # minutes between checkpoints
RUN_HOURS, RUNS = 100.0, 1000
RARE, SLOW = 1000, 0.8  # one GPU of so many is slow, and how slow (assumed)
JITTER = 0.03  # deviation of the time of a step, as a share of it (assumed)


def all_reduce_ms(size: float, gpus: int, links: Links) -> float:
    """A ring in each node, then one of nodes for each of its GPUs, over that GPU's share.

    A ring of n moves 2 (n - 1) / n of its bytes through each link, in 2 (n - 1) messages.
    """
    nodes, time = max(gpus // NODE, 1), 0.0
    for n, part, speed in ((min(gpus, NODE), size, links.inside), (nodes, size / NODE, links.outside)):
        time += 2 * (n - 1) / n * part / (speed * 1e6) + 2 * (n - 1) * links.latency * 1e-3
    return time


def step_ms(images_per_second: float, size: float, gpus: int, links: Links) -> tuple[float, float, float]:
    """Computing, reducing, and both: two thirds of a step are its backward pass, which hides as much."""
    compute, reduce = 1e3 * BATCH / gpus / images_per_second, all_reduce_ms(size, gpus, links)
    return compute, reduce, compute + max(reduce - compute * 2 / 3, 0.0)


def slowest(gpus: int, rare: bool = False) -> float:
    """Mean time of a step that waits for the slowest of so many, over the mean of one; simulated.

    rare: some GPUs are slow throughout a step.
    """
    chance = np.random.default_rng(0)
    steps = chance.normal(1.0, JITTER, (2000, gpus))
    if rare:
        steps /= np.where(chance.random((2000, gpus)) < 1 / RARE, SLOW, 1.0)
    return float(steps.max(1).mean())


def restarts(gpus: int, between: float) -> tuple[float, float, float]:
    """Failures of a run of RUN_HOURS, and the hours that they cost, over RUN_HOURS: mean and 95th percentile;
    simulated.

    between: minutes between checkpoints.
    """
    chance, every = np.random.default_rng(0), between / 60
    costs, failures = [], 0
    for _ in range(RUNS):
        done = spent = 0.0
        while done < RUN_HOURS:
            fails = chance.exponential(GPU_HOURS_PER_FAILURE / gpus)
            if done + fails >= RUN_HOURS:
                spent, done = spent + RUN_HOURS - done, RUN_HOURS
            else:
                # A run goes on from a checkpoint, and counts the next one from there.
                spent, done = spent + fails + RESTART / 60, done + fails // every * every
                failures += 1
        costs.append(spent / RUN_HOURS - 1)
    return failures / RUNS, float(np.mean(costs)), float(np.percentile(costs, 95))


def processes() -> list[str]:
    """The section on several GPUs: a model of traffic, not a measurement."""
    with torch.device("meta"):
        model = convert(timm.create_model("deit_base_patch16_224"))
    sizes = [
        4 * cost(model, s).params
        for s in (Structure.dense(model), Structure.uniform(model, heads=KEEP, neurons=KEEP))
    ]
    shape = Shape(128, 197, 768, 12, 64, 3072, stem=196 * 768 * 768)
    half = Kept(*(round(KEEP * n) for n in everything(shape)))
    rates = [
        1e3 * 128 / model_work(shape, [kept] * 12, 2, True).floor_ms(LIMIT)
        for kept in (everything(shape), half)
    ]
    table = [
        "| GPUs | links | structure | MB sent | computing, ms | reducing, ms | step, ms | images/s | "
        "rate of a GPU, to that of 8 |",
        "|---" * 9 + "|",
    ]
    for links in LINKS:
        for name, size, rate in zip(("dense", f"keep {KEEP:g}"), sizes, rates, strict=True):
            one = None
            for gpus in COUNTS:
                compute, reduce, step = step_ms(rate, size, gpus, links)
                one = one or step * gpus
                table.append(
                    f"| {gpus} | {links.name} | {name} | {size / 1e6:.0f} | {compute:.2f} | {reduce:.2f} | "
                    f"{step:.2f} | {1e3 * BATCH / step:,.0f} | {one / (step * gpus):.0%} |"
                )
    losses = [
        "| GPUs | failures in a run | "
        + " | ".join(f"lost at {between:g} min: mean, 1 run in 20" for between in BETWEEN)
        + " | waiting | waiting, with slow GPUs |",
        "|---" * (4 + len(BETWEEN)) + "|",
    ]
    for gpus in COUNTS:
        found = [restarts(gpus, between) for between in BETWEEN]
        lost = " | ".join(f"{mean:.3%}, {worse:.3%}" for _, mean, worse in found)
        waits = f"{slowest(gpus) - 1:.1%} | {slowest(gpus, rare=True) - 1:.1%}"
        losses.append(f"| {gpus} | {found[0][0]:.2f} | {lost} | {waits} |")
    return [
        "## DeiT-B on 8, 64 and 512 GPUs: computed, not measured",
        SEVERAL.format(batch=BATCH, node=NODE, latency=LINKS[0].latency),
        "\n".join(table),
        ENDS,
        LOSSES.format(
            runs=f"{RUNS:,}",
            length=RUN_HOURS,
            hours=GPU_HOURS_PER_FAILURE,
            restart=RESTART,
            jitter=JITTER,
            rare=RARE,
            slow=SLOW,
        ),
        "\n".join(losses),
    ]


def pipeline(results: Path) -> list[str]:
    """The section on images per second, from what was measured and the limits."""
    found = {}
    for path in sorted(results.rglob("images.csv")):
        with open(path, newline="") as opened:
            found |= {row["views"]: row for row in csv.DictReader(opened)}  # the last of each
    if not found:
        return []
    rate, policy = (float(found[views]["images_per_s"]) for views in ("plain", "rand-m9"))
    table = [
        "| model | images/s of a GPU, dense | cores for them | images/s at keep 0.5 | cores for them |",
        "|---" * 5 + "|",
    ]
    for name, (dense, half) in limit_rates().items():
        cells = (f"{images:,.0f} | {images / rate:,.0f}" for images in (dense, half))
        table.append(f"| {name} | {' | '.join(cells)} |")
    about = PIPELINE.format(
        rate=rate, policy=policy, kbyte=float(found["plain"]["kbyte"]), device=found["plain"]["device"]
    )
    return ["## The images: measured rates against computed steps", about, "\n".join(table), READING]


def limit_rates() -> dict[str, tuple[float, float]]:
    """Images per second of one GPU at its limit: dense, and at KEEP."""
    found = {}
    for name, dim, batch in MODELS.values():
        shape = Shape(batch, 197, dim, dim // 64, 64, 4 * dim, stem=196 * 768 * dim)
        half = Kept(*(round(KEEP * n) for n in everything(shape)))
        found[name] = tuple(
            1e3 * batch / model_work(shape, [kept] * 12, 2, True).floor_ms(LIMIT)
            for kept in (everything(shape), half)
        )
    return found


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

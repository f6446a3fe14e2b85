"""One model for several budgets against a model for each: rows of elastic.csv, and the page's table."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bench.quality.context import Context, macs_of
from bench.quality.harness import append, epoch_macs
from bench.quality.report import OURS, Row, interval, line, read_rows
from bench.quality.tasks import TASKS
from uvc.compaction import compact
from uvc.elastic import set_budget
from uvc.environment import commit, processor, versions_line
from uvc.training.compress import compress

RESULTS = Path(__file__).parent / "elastic.csv"
BUDGETS = (0.5, 0.33, 0.15)
# Each step of it trains two budgets; so many epochs make 0.56 of the compute of three runs.
POST_EPOCHS = 14
SWITCHES = 60
FIELDS = (
    "task seed budget search_epochs post_epochs macs_ratio teacher_top1 after_top1 val_after train_compute "
    "seconds switch_ms forward_ms device versions commit date version"
).split()
# Changed when a row would come out different; the page reads the latest rows only.
VERSION = 2


def run_seed(task: str, seed: int) -> list[dict[str, object]]:
    """One run for all of `BUDGETS`, with the bench's settings but for two more epochs after the search and no
    dropped tokens; a row for each budget.
    """
    context = Context(TASKS[task], seed, BUDGETS[0])
    solver = replace(context.config.solver, tokens=0)
    config = replace(context.config, post_epochs=POST_EPOCHS, solver=solver)
    model, start = context.student(), time.process_time()
    args = (model, context.batches, context.val, BUDGETS, "macs", context.teacher, config)
    compress(*args, log=context.log)
    seconds = time.process_time() - start
    context.meter.stop()
    switch, forward = timed(model, next(iter(context.test))[0][:1])
    common = {
        "task": task,
        "seed": seed,
        "search_epochs": config.search_epochs,
        "post_epochs": config.post_epochs,
        "teacher_top1": context.top1(context.dense),
        "train_compute": context.meter.macs / epoch_macs(context),
        "seconds": seconds,
        "switch_ms": switch,
        "forward_ms": forward,
        "device": processor(),
        "versions": versions_line(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "version": VERSION,
    }
    rows = []
    for budget in BUDGETS:
        set_budget(model, budget)
        own = {
            "budget": budget,
            "macs_ratio": macs_of(compact(model)) / macs_of(context.dense),
            "after_top1": context.top1(model),
            "val_after": context.top1(model, "val"),
        }
        row = {**common, **own}
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


@torch.no_grad()
def timed(model: nn.Module, image: torch.Tensor) -> tuple[float, float]:
    """Median milliseconds of a switch from one budget to the next, and of a forward pass after it."""
    switches, passes = [], []
    for i in range(SWITCHES):
        start = time.perf_counter()
        set_budget(model, BUDGETS[i % len(BUDGETS)])
        switched = time.perf_counter()
        model(image)
        switches.append(switched - start)
        passes.append(time.perf_counter() - switched)
    return 1e3 * statistics.median(switches), 1e3 * statistics.median(passes)


def read(file: Path = RESULTS) -> list[Row]:
    """Rows of the latest version."""
    return read_rows(file, VERSION)


def run(tasks: Sequence[str], seeds: Sequence[int], minutes: float, file: Path = RESULTS) -> None:
    """Runs what is missing; none begins when the time is up."""
    torch.set_num_threads(1)
    done, deadline = {(row["task"], row["seed"]) for row in read(file)}, time.time() + 60 * minutes
    for seed in seeds:
        for task in tasks:
            if (task, str(seed)) in done or time.time() >= deadline:
                continue
            rows = run_seed(task, seed)
            append(rows, file, FIELDS)
            found = ", ".join(f"{row['budget']}: {row['after_top1']}" for row in rows)
            print(f"{task} seed {seed}: {found}; compute {rows[0]['train_compute']}", flush=True)


def table(rows: list[Row], alone: list[Row]) -> list[str]:
    """Together against alone, paired by seed, for every budget and for their mean; compute of three runs, and
    of one.

    alone: rows of results.csv.
    """
    alone = [row for row in alone if row["arm"] == OURS and row["mode"] == "epochs"]
    by = {(row["task"], float(row["budget"]), row["seed"]): row for row in alone}
    out = [
        "| task | budget | seeds | alone | together | together - alone | compute alone | compute together |",
        "|---" * 8 + "|",
    ]
    for task in sorted({row["task"] for row in rows}):
        pairs = defaultdict(list)  # by budget: (alone, together), seed by seed
        for row in sorted((r for r in rows if r["task"] == task), key=lambda r: int(r["seed"])):
            budget = float(row["budget"])
            if (other := by.get((task, budget, row["seed"]))) is not None:
                pairs[budget].append((other, row))
        if not pairs:
            continue
        for budget, both in sorted(pairs.items(), reverse=True):
            cost = statistics.fmean(float(a["train_compute"]) for a, _ in both)
            out.append(_line(task, f"{budget:g}", _top1(both), f"{cost:.2f}", ""))
        every = [[_top1(pairs[budget])[i] for budget in pairs] for i in range(min(map(len, pairs.values())))]
        means = [tuple(statistics.fmean(one) for one in zip(*seed, strict=True)) for seed in every]
        three = sum(statistics.fmean(float(a["train_compute"]) for a, _ in both) for both in pairs.values())
        one = statistics.fmean(float(t["train_compute"]) for _, t in next(iter(pairs.values())))
        out.append(_line(task, "all", means, f"{three:.2f}", f"{one:.2f}, {one / three:.2f} of it"))
    return out if len(out) > 2 else ["No row yet."]


def _top1(both: list[tuple[Row, Row]]) -> list[tuple[float, float]]:
    return [(float(a["after_top1"]), float(t["after_top1"])) for a, t in both]


def _line(task: str, budget: str, pairs: list[tuple[float, float]], alone: str, together: str) -> str:
    means = [f"{statistics.fmean(values):.2f}" for values in zip(*pairs, strict=True)]
    difference = "{:+.2f} ± {:.2f}".format(*interval([t - a for a, t in pairs]))
    cells = [task, budget, str(len(pairs)), *means, difference, alone, together]
    return line(cells)


def stand(rows: list[Row]) -> str:
    """How the runs were made, and how long a switch takes."""
    if not rows:
        return ""
    epochs = sorted({f"{row['search_epochs']} and {row['post_epochs']}" for row in rows})
    by_task = {}
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in rows if row["task"] == task]
        by_task[task] = [
            statistics.median(float(r[name]) for r in own) for name in ("switch_ms", "forward_ms")
        ]
    times = "; ".join(
        f"{task}: a switch {switch:.2f} ms, a pass of one image after it {forward:.2f} ms"
        for task, (switch, forward) in by_task.items()
    )
    made = ", ".join(sorted({row["device"] for row in rows}))
    return (
        f"Epochs of search and post-training: {', '.join(epochs)}. Medians on one thread of a busy machine, "
        f"{times}. {made}, commit {', '.join(sorted({row['commit'] for row in rows}))}, with "
        f"{'; '.join(sorted({row['versions'] for row in rows}))}."
    )

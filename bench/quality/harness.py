"""Runs what is not in the CSV yet, cheapest first and paired: seed by seed, small budgets before large
ones.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench.quality.arms import ARMS, context_of
from bench.quality.context import COMPUTE_EPOCHS, Context, converted, locked, macs_of
from bench.quality.report import read_rows
from bench.quality.tasks import TASKS
from uvc.compaction import compact
from uvc.costs import block_costs, counts, total
from uvc.latency_table import measure_latency
from uvc.structure import Structure, structure_of

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = (
    "task seed budget arm mode search_epochs post_epochs macs_ratio teacher_top1 before_top1 after_top1 "
    "val_before val_after search_seconds post_seconds train_compute latency_ms latency_ratio "
    "off_blocks off_heads off_dims off_neurons off_tokens structure date version"
).split()
TRACES = "traces.csv"  # of UVC's searches at TRACED_SEED
TRACED_SEED = 0
TRACE_FIELDS = (
    "task seed budget step target soft_cost hard_cost z gates removed_qk removed_v removed_neuron y_qk y_v "
    "y_neuron version"
).split()
# Changed when a row would come out different: an arm or the common settings. Reports take the latest one
# only.
VERSION = 1


class Job(NamedTuple):
    """One row to be. mode: "epochs" (equal epochs) or "compute" (equal total training compute)."""

    seed: int
    budget: float
    task: str
    arm: str
    mode: str


def jobs(
    arms: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], tasks: Sequence[str], mode: str
) -> list[Job]:
    """Every row asked for, in the order of running: all arms of a seed and budget before the next."""
    wanted = {
        Job(seed, budget if ARMS[arm].budgeted else 1.0, task, arm, mode)
        for seed in seeds
        for budget in budgets
        for task in tasks
        for arm in arms
    }
    names = list(ARMS)
    return sorted(wanted, key=lambda j: (j.seed, j.budget, list(TASKS).index(j.task), names.index(j.arm)))


def run_job(job: Job, trace: list[dict[str, float]] | None = None) -> dict[str, object]:
    """Trains one arm; returns its row. Takes what its search logged into ``trace``."""
    arm = ARMS[job.arm]
    context = context_of(arm, Context(TASKS[job.task], job.seed, job.budget, job.mode == "compute"))
    dense_top1 = context.top1(context.dense)
    context.teacher  # noqa: B018  its answers are common to all arms: not on this one's clock
    start = time.process_time()
    model = arm.make(context)
    searched = time.process_time() - start
    if trace is not None:
        trace += context.log.searched
    facts = anatomy(context, model)
    before = {part: context.top1(model, part) for part in ("test", "val")}
    epochs = post_epochs(context, model, job)
    start = time.process_time()
    model = context.post_train(model, epochs)
    trained = time.process_time() - start
    images = next(iter(context.test))[0][:64]
    latency = measure_latency({"dense": context.dense, "small": model}, images)
    ratio = macs_of(model) / macs_of(context.dense)
    if ratio > job.budget + 1e-9 and job.arm != "published":
        raise RuntimeError(f"{job}: the result costs {ratio:.4f}, above its budget")
    row = {
        **job._asdict(),
        "search_epochs": context.config.search_epochs if arm.search else 0,
        "post_epochs": epochs,
        "macs_ratio": ratio,
        "teacher_top1": dense_top1,
        "before_top1": before["test"],
        "after_top1": context.top1(model),
        "val_before": before["val"],
        "val_after": context.top1(model, "val"),
        "search_seconds": searched,
        "post_seconds": trained,
        "train_compute": context.meter.macs / epoch_macs(context),
        "latency_ms": latency["small"],
        "latency_ratio": latency["small"] / latency["dense"],
        **facts,
        "date": time.strftime("%Y-%m-%d"),
        "version": VERSION,
    }
    return {name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in FIELDS}


def post_epochs(context: Context, model: nn.Module, job: Job) -> int:
    """Epochs that are left: of the common number of epochs, or of the common compute."""
    arm, config = ARMS[job.arm], context.config
    extra = config.teacher_epochs if arm.scratch else 0
    if job.mode == "epochs":
        return extra + config.post_epochs + (0 if arm.search else config.search_epochs)
    left = COMPUTE_EPOCHS + extra - context.meter.macs / epoch_macs(context)
    return max(round(left / context.ratio(model)), 1)


def epoch_macs(context: Context) -> float:
    """What one epoch of the dense model costs, forward and backward."""
    return 3.0 * macs_of(context.dense) * len(context.batches) * context.config.batch_size


def anatomy(context: Context, model: nn.Module) -> dict[str, object]:
    """Points of the dense MACs that went with skipped halves, removed heads, dims of kept heads, and neurons,
    all at the dense number of tokens, and then with tokens that what is left does not see.

    structure: per block, kept q/k and v dims of each kept head, neurons, and patch tokens where some go; "-"
    for a skipped half.
    """
    parts = ("blocks", "heads", "dims", "neurons", "tokens")
    if not converted(model):
        return dict.fromkeys((*(f"off_{name}" for name in parts), "structure"), "")
    price, structure = context.prices, structure_of(model)
    dense = counts(Structure.dense(model))
    width = [dense.qk[0] // model.blocks[0].attn.num_heads] * 2
    none = (0,) * len(structure.blocks)
    attns, mlps = block_costs(price, dense._replace(mlp=none)), block_costs(price, dense._replace(attn=none))
    off, kept = dict.fromkeys(parts, 0), []
    for i, block in enumerate(structure.blocks):
        if block.attn:
            lost = model.blocks[0].attn.num_heads - len(block.heads)
            off["heads"] += lost * (price.qk[i] * width[0] + price.v[i] * width[1])
            off["dims"] += sum(price.qk[i] * (width[0] - len(d)) for d in block.qk_dims)
            off["dims"] += sum(price.v[i] * (width[1] - len(d)) for d in block.v_dims)
        else:
            off["blocks"] += attns[i]
        if block.mlp:
            off["neurons"] += price.neuron[i] * (dense.neuron[i] - len(block.neurons))
        else:
            off["blocks"] += mlps[i]
        heads = "+".join(f"{len(q)}/{len(v)}" for q, v in zip(block.qk_dims, block.v_dims, strict=True))
        tokens = "" if block.tokens is None else f" {block.tokens}"
        kept.append(f"{heads if block.attn else '-'} {len(block.neurons) if block.mlp else '-'}{tokens}")
    everything = macs_of(context.dense)
    off["tokens"] = total(price, counts(structure)) - macs_of(compact(model))
    points = {f"off_{name}": 100.0 * cost / everything for name, cost in off.items()}
    return {**points, "structure": "|".join(kept)}


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    """Rows of the latest version."""
    return read_rows(file, VERSION)


def append(rows: Sequence[dict[str, object]], file: Path, fields: Sequence[str] = FIELDS) -> None:
    """Rows in one write, under a lock: those of several workers never mix, a killed one leaves none in
    part.
    """
    with locked(file.with_suffix(".lock")):
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n", extrasaction="ignore")
        if not file.exists() or file.stat().st_size == 0:
            writer.writeheader()
        writer.writerows(rows)
        with open(file, "ab", buffering=0) as handle:
            handle.write(text.getvalue().encode())


def append_trace(job: Job, trace: Sequence[dict[str, float]], file: Path) -> None:
    """What the search of a row logged, into the CSV of traces beside the results."""
    common = {"task": job.task, "seed": job.seed, "budget": job.budget, "version": VERSION}
    rows = [{k: round(v, 6) if isinstance(v, float) else v for k, v in step.items()} for step in trace]
    append([{**common, **row} for row in rows], file.with_name(TRACES), TRACE_FIELDS)


def key(row: dict[str, str] | Job) -> tuple:
    """What identifies a row."""
    row = row._asdict() if isinstance(row, Job) else row
    return (row["task"], int(row["seed"]), float(row["budget"]), row["arm"], row["mode"])


def run(wanted: Iterable[Job], minutes: float, workers: int, file: Path = RESULTS) -> int:
    """Runs what is missing, until the time is up: a row that has begun is finished. Returns how many are
    left.
    """
    done = {key(row) for row in read(file)}
    missing = [job for job in wanted if key(job) not in done]
    deadline = time.time() + 60 * minutes
    spawn = multiprocessing.get_context("spawn")
    place = spawn.Value("i", 0)
    if workers == 1:
        work(missing, place, deadline, file)
    else:
        processes = [
            spawn.Process(target=work, args=(missing, place, deadline, file)) for _ in range(workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    done = {key(row) for row in read(file)}
    return sum(key(job) not in done for job in missing)


def work(missing: list[Job], place: object, deadline: float, file: Path) -> None:
    """A worker on one thread: takes the next job until none is left or the time is up. A failure is said
    once.
    """
    torch.set_num_threads(1)
    while time.time() < deadline:
        with place.get_lock():
            index, place.value = place.value, place.value + 1
        if index >= len(missing):
            return
        job, start = missing[index], time.time()
        trace: list[dict[str, float]] = []
        try:
            row = run_job(job, trace)
        except (ValueError, RuntimeError) as error:
            print(f"{job.arm} {job.task} seed {job.seed} budget {job.budget}: {error}", flush=True)
            continue
        append([row], file)
        if (job.arm, job.seed, job.mode) == ("uvc", TRACED_SEED, "epochs"):
            append_trace(job, trace, file)
        print(
            f"{job.arm} {job.task} seed {job.seed} budget {job.budget}: {row['before_top1']} -> "
            f"{row['after_top1']} at {row['macs_ratio']} in {time.time() - start:.0f} s",
            flush=True,
        )

"""Runs what is not in the CSV yet, the most telling rows first; a row is appended when it is whole."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.quality.harness import append
from bench.quality.report import read_rows
from bench.real.arms import ARMS, AT_ONCE, rival, uvc
from bench.real.pictures import count
from bench.real.setup import VERSION, Setup
from bench.real.teacher import teacher
from uvc.environment import commit, processor, versions_line
from uvc.training.signals import Stopped, stop_on_signals

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = (
    "part seed budget arm mode learning_rate search_learning_rate search_epochs post_epochs train_compute "
    "macs_ratio params_ratio probe_top1 teacher_top1 before_top1 after_top1 seconds cpu_seconds train_images "
    "val_images teacher_learning_rate teacher_epochs batch_size precision crop_scale threads device "
    "versions commit date version"
).split()
FIRST = ("uvc", "global_taylor")


class Job(NamedTuple):
    """One row to be. mode: "epochs" (equal epochs) or "compute" (the training compute of UVC's row)."""

    part: str
    seed: int
    budget: float
    arm: str
    mode: str
    learning_rate: float


def jobs(
    setup: Setup, arms: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], mode: str = "epochs"
) -> list[Job]:
    """Every row asked for, in the order of running: seed by seed, UVC and its simplest rival before the
    others, small budgets before large ones. The dense control has one row a seed, at the end. At equal
    compute there are rows of the one-shot greedy.
    """
    wanted = {
        Job(setup.part, seed, 1.0 if arm == "dense_extra" else budget, arm, mode, setup.config.learning_rate)
        for seed in seeds
        for budget in budgets
        for arm in arms
        if mode == "epochs" or arm in AT_ONCE
    }
    return sorted(
        wanted, key=lambda j: (j.budget == 1.0, j.seed, j.arm not in FIRST, j.budget, ARMS.index(j.arm))
    )


def run_job(setup: Setup, job: Job, compute: float | None = None) -> dict[str, object]:
    """Trains one arm; returns its row. compute: what UVC's took, of a job at equal compute."""
    torch.set_num_threads(setup.config.threads)
    _, known = teacher(setup, job.seed)
    found = (
        uvc(setup, job.seed, job.budget)
        if job.arm == "uvc"
        else rival(setup, job.arm, job.seed, job.budget, compute)
    )
    if found["macs_ratio"] > job.budget + 1e-9:
        raise RuntimeError(f"{job}: the result costs {found['macs_ratio']:.4f}, above its budget")
    train, val = count(setup.data)
    row = {
        **job._asdict(),
        **found,
        "probe_top1": known["probe_top1"],
        "train_images": train,
        "val_images": val,
        "teacher_learning_rate": setup.teacher_rate,
        "teacher_epochs": setup.config.teacher_epochs,
        "batch_size": setup.config.batch_size,
        "precision": setup.config.precision,
        "search_learning_rate": setup.config.search_learning_rate,
        "crop_scale": setup.views.scale[0],
        "threads": setup.config.threads,
        "device": processor(),
        "versions": versions_line(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "version": VERSION,
    }
    return {name: round(row[name], 5) if isinstance(row[name], float) else row[name] for name in FIELDS}


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    """Rows of the latest version."""
    return read_rows(file, VERSION)


def key(row: dict[str, str]) -> Job:
    """What identifies a row."""
    return Job(
        row["part"],
        int(row["seed"]),
        float(row["budget"]),
        row["arm"],
        row["mode"],
        float(row["learning_rate"]),
    )


def _bill(job: Job, rows: Iterable[dict[str, str]]) -> float | None:
    """What UVC's row took, where a job may cost as much; ValueError if it is not there."""
    if job.mode == "epochs":
        return None
    ours = job._replace(arm="uvc", mode="epochs")
    found = [row["train_compute"] for row in rows if key(row) == ours and row["train_compute"]]
    if not found:
        raise ValueError("equal compute is that of UVC, whose row is missing; run --arms uvc first")
    return float(found[0])


def run(setup: Setup, wanted: Iterable[Job], minutes: float, file: Path = RESULTS) -> int:
    """Runs what is missing until the time is up: a row that has begun is finished. Returns how many are
    left.
    """
    done = {key(row) for row in read(file)}
    missing, deadline = [job for job in wanted if job not in done], time.monotonic() + 60 * minutes
    for job in missing:
        if time.monotonic() >= deadline:
            break
        try:
            with stop_on_signals():
                row = run_job(setup, job, _bill(job, read(file)))
        except Stopped as stopped:
            print(f"{job.arm} seed {job.seed} budget {job.budget}: {stopped}", flush=True)
            break
        except (ValueError, RuntimeError) as error:
            print(f"{job.arm} seed {job.seed} budget {job.budget}: {error}", flush=True)
            continue
        append([row], file, FIELDS)
        print(
            f"{job.arm} seed {job.seed} budget {job.budget}: {row['before_top1']} -> {row['after_top1']} at "
            f"{row['macs_ratio']} in {row['seconds']:.0f} s",
            flush=True,
        )
    done = {key(row) for row in read(file)}
    return sum(job not in done for job in missing)

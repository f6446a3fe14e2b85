"""A whole run from its config to files: data, model, teacher, compression, and what is left in the folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uvc.app import figures
from uvc.app.run_dir import SUMMARY, check_out, open_out, read_summary
from uvc.app.start import TEACHER, begin, model_input, open_data
from uvc.app.summary import draw_run
from uvc.compaction import compact, form_for
from uvc.config import RunConfig
from uvc.constraints import reachable
from uvc.environment import choose_device
from uvc.io.card import Subject, write_card
from uvc.io.files import write_json
from uvc.io.preprocessing import note_data, preprocessing_of
from uvc.io.serialization import load, save
from uvc.latency_table import LatencyTable
from uvc.layers import convert
from uvc.recipes import AIMS
from uvc.structure import structure_of
from uvc.training.checkpoint import delete_run
from uvc.training.compress import carry_out, train_teacher
from uvc.training.data import Data
from uvc.training.evaluation import evaluate
from uvc.training.logger import RunLog
from uvc.training.plan import Plan
from uvc.training.processes import here
from uvc.training.trackers import check_trackers

CHECKPOINT = "checkpoint.safetensors"


def compress_run(
    run: RunConfig, *, progress: bool = False, say: Callable[[str], object] = lambda line: None
) -> dict[str, Any] | None:
    """Compress as `run` says, write the folder `run.out`, return the summary; of several processes in rank 0.

    `say` gets a line for each metric: what budgets can be reached. All that can be wrong is checked before
    `out` is touched: ValueError or RuntimeError, one line each.
    """
    if run.out is None:
        raise ValueError("--out: none given; name a new or empty folder for the run")
    out, started = Path(run.out), time.monotonic()
    check_out(out, run.resume)
    check_trackers(run.trackers)
    if run.resume and (out / SUMMARY).is_file():
        return read_summary(out)
    device = choose_device(run.device, run.threads)
    processes = here(device.type, run.threads)
    processes.wait()  # what is in `out` has been looked at by all before one writes there
    device = processes.device or device
    data = open_data(run, model_input(run))
    torch.manual_seed(run.seed)
    model, trained = begin(run, data, out)
    model = convert(model).to(device)
    note_data(model, data.view, data.classes)
    plan = Plan(
        model,
        data.train,
        data.val,
        run.budget,
        run.metric,
        run.training,
        out=out,
        resume=run.resume,
        latency=LatencyTable.load(Path(run.latency_table)) if run.latency_table else None,
        latency_batch=run.latency_batch,
        teacher_cache=Path(run.teacher_cache) if run.teacher_cache else None,
        processes=processes,
    )
    with processes.in_turn():
        open_out(out, run)
    for line in reachable(model, plan.latency, plan.config.solver.round_to):
        say(f"reachable {line}")
    aim = AIMS.get(run.recipe)
    if aim and aim.model == run.model:
        say(f"published by others, not ours: {aim.published}")

    with RunLog(out, progress, run.trackers) if processes.main else RunLog(None) as log:
        plan.begin(log)
        if not trained:
            _make_teacher(model, data, plan, out, log)
        elif run.pretrained and processes.main:
            save(model, out / TEACHER)  # a resumed run needs no hub
        # A run that is resumed after its teacher sees the batches of a run in one go.
        data.train.load_state_dict({"epoch": run.training.teacher_epochs, "batch": 0})
        result = carry_out(plan, log)
    small = compact(result.model, form_for(device))
    top1 = evaluate(small, data.val, device, processes.total)
    rows = [figures.of_budget(result, budget, data, device, processes) for budget in result.structures]
    if not processes.main:
        return None
    summary = figures.of_run(run, plan, data, result, small, top1) | ({"budgets": rows} if rows else {})
    summary["seconds"] = time.monotonic() - started
    draw_run(out, summary)
    model = load(out)
    images = preprocessing_of(model) or {}
    write_card(out, Subject(run.model, model, structure_of(model), images, summary))
    # Last: a folder with a summary is a finished run.
    write_json(out / SUMMARY, summary)
    delete_run(out / CHECKPOINT)
    return summary


def _make_teacher(model: nn.Module, data: Data, plan: Plan, out: Path, log: RunLog) -> None:
    """Train the teacher and keep it for a run that goes on."""
    checkpoint = out / TEACHER / CHECKPOINT
    train_teacher(model, data.train, data.val, plan.config, log, checkpoint, plan.processes)
    if plan.processes.main:
        save(model, out / TEACHER)
        delete_run(checkpoint)

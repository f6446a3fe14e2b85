"""The figures of a finished run, for `summary.json`."""

import json
from typing import Any

import torch
from torch import nn

from uvc.app.block_times import PARTS, block_times
from uvc.compaction import compact
from uvc.config import RunConfig
from uvc.costs import cost
from uvc.elastic import set_budget
from uvc.environment import device_name, versions
from uvc.latency_table import LatencyTable, measure_latency, verify
from uvc.training.compress import Result
from uvc.training.data import Data
from uvc.training.evaluation import evaluate
from uvc.training.plan import Plan
from uvc.training.processes import Alone

LATENCY_BATCHES = (1, 64)


def of_run(
    run: RunConfig, plan: Plan, data: Data, result: Result, small: nn.Module, top1: float
) -> dict[str, Any]:
    """The figures of a finished run. small: the compacted model, of which top1 was counted."""
    device = next(result.model.parameters()).device
    return {
        "model": run.model,
        "data": data.name,
        "seed": run.seed,
        "budget": run.budget,
        "metric": ",".join(run.budgets),
        "dense_macs": result.dense_cost.macs,
        "final_macs": result.cost.macs,
        "macs_ratio": result.cost.macs / result.dense_cost.macs,
        "dense_params": result.dense_cost.params,
        "final_params": result.cost.params,
        "teacher_top1": result.teacher_top1,
        "before_post_top1": result.before_post_top1,
        "final_top1": top1,
        "steps": result.steps,
        "processes": plan.processes.count,
        "precision": result.precision,
        "device": device_name(device) if device.type == "cuda" else "cpu",
        "latency": _latency(result.teacher, small, data, device),
        "block_ms": _block_ms(result.teacher, small, data, device),
        **({"latency_budget": _latency_check(plan.latency, result.teacher, small)} if plan.latency else {}),
        "versions": versions(),
        "structure": json.loads(result.structure.to_json()),
    }


def of_budget(
    result: Result, budget: float, data: Data, device: torch.device, processes: Alone
) -> dict[str, Any]:
    """The figures of a finished run at one of its budgets."""
    small = compact(set_budget(result.model, budget))
    set_budget(result.model, next(iter(result.structures)))
    figures, dense = cost(small), result.dense_cost
    return {
        "budget": budget,
        "macs": figures.macs,
        "macs_ratio": figures.macs / dense.macs,
        "params": figures.params,
        "params_ratio": figures.params / dense.params,
        "before_post_top1": result.before_post_scores[budget],
        "final_top1": evaluate(small, data.val, device, processes.total),
    }


def _latency_check(table: LatencyTable, teacher: nn.Module, small: nn.Module) -> dict[str, Any]:
    check = verify(table, teacher, small)
    return {
        "batch": table.batch,
        "table_device": table.device,
        "predicted_ratio": check.predicted,
        "measured_ratio": check.measured,
        "teacher_ms": check.dense_ms,
        "compressed_ms": check.compacted_ms,
    }


def _block_ms(teacher: nn.Module, small: nn.Module, data: Data, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each block with one image; hooks on blocks are none of a teacher's or a model's own."""
    images = torch.randn(1, *data.input_size, device=device)
    return {"batch": 1, "parts": PARTS, **block_times({"teacher": teacher, "compressed": small}, images)}


def _latency(
    teacher: nn.Module, small: nn.Module, data: Data, device: torch.device
) -> list[dict[str, float]]:
    figures = []
    for batch in LATENCY_BATCHES:
        images = torch.randn(batch, *data.input_size, device=device)
        times = measure_latency({"teacher": teacher, "compressed": small}, images)
        figures.append({"batch": batch, "teacher_ms": times["teacher"], "compressed_ms": times["compressed"]})
    return figures

"""A teacher, and ``compress``: warm up, search, harden, post-train."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from uvc.compaction import compact
from uvc.config import Config
from uvc.constraints import check_grain, limits, named_budgets
from uvc.costs import Cost, cost
from uvc.io.serialization import save
from uvc.latency_table import LatencyTable, measure
from uvc.layers import check, check_children, convert
from uvc.solver import METHODS, check_tokens
from uvc.structure import Structure, apply_structure, structure_of
from uvc.training.checkpoint import set_seed
from uvc.training.evaluation import evaluate
from uvc.training.logger import RunLog
from uvc.training.losses import Classification, Distillation
from uvc.training.teacher_cache import cached
from uvc.training.trainer import Trainer

LATENCY = "latency.json"  # the table, in the folder of a run


@dataclass(frozen=True)
class Result:
    """What ``compress`` returns. model: converted, full-size weights, the final structure applied. top-1 in
    percent.
    """

    model: nn.Module
    structure: Structure
    cost: Cost
    dense_cost: Cost
    teacher_top1: float
    before_post_top1: float
    final_top1: float
    steps: int
    history: list[dict[str, Any]] = field(repr=False)


def train_teacher(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    config: Config,
    log: RunLog,
    file: Path | None = None,
) -> float:
    """Trains a dense model on labels, in place, for ``config.teacher_epochs``; returns top-1 in percent."""
    trainer = Trainer(model, train_loader, val_loader, config, log, file)
    if file is not None and file.exists():
        trainer.load()
    set_seed(config.seed, bool(trainer.mix))
    task = Classification(config.label_smoothing, config.precision)
    trainer.phase("teacher", config.teacher_epochs, task, trainer.optimizer(config.learning_rate))
    return evaluate(model, val_loader)


def compress(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    budget: float | Mapping[str, float] = 0.5,
    metric: str = "macs",
    teacher: nn.Module | None = None,
    config: Config | None = None,
    out: str | Path | None = None,
    log: RunLog | None = None,
    resume: bool = False,
    latency: LatencyTable | None = None,
    teacher_cache: str | Path | None = None,
) -> Result:
    """Compresses a trained timm ViT to a budget: warm up, search, harden, post-train.

    Args:
        model: trained model; converted and trained in place.
        train_loader, val_loader: yield (images [B, C, H, W] float, labels [B] int64).
        budget: fraction in (0, 1] of the dense cost; the result costs at most that. Or several at once:
            {"macs": 0.5, "params": 0.6}.
        metric: "macs", "params" or "latency": what a single fraction counts.
        teacher: distilled from; None = a frozen copy of ``model`` as given.
        config: ``uvc.config.Config``; None = the default recipe.
        out: folder for log, checkpoint and, at the end, the compacted model (for ``uvc.load``) and
            structure.json; None = nothing is written.
        log: where to report; None = a new ``RunLog(out)``.
        resume: continue from the checkpoint in ``out``, if there is one.
        latency: what prices latency, from ``uvc.latency_table.measure`` on the device to be fast on; None =
            measured here and now, for batches of one image on the model's device.
        teacher_cache: folder that keeps the teacher's answers, for other budgets and resumed runs; only for
            loaders of ``uvc.training.data``; None = the teacher answers in every step.

    Raises:
        ValueError: a bad argument, named; a budget below the smallest reachable one, before any training.
    """
    config = config or Config()
    if config.solver.method not in METHODS:
        known = " and ".join(repr(name) for name in METHODS)
        raise ValueError(f"solver method: {config.solver.method!r}; known are {known}")
    check(model)
    check_children(model)  # what the final compaction would refuse, before any training
    named = named_budgets(budget, metric)
    if config.solver.method == "published" and list(named) not in (["macs"], ["params"]):
        raise ValueError(f"budget: {named}; the published method takes one, in macs or params")
    if latency is not None and "latency" not in named:
        raise ValueError('latency: a table is given, but no budget is in it; add metric="latency"')
    check_grain(model, config.solver.grain)
    check_tokens(model, config.solver.tokens, tuple(named))
    table_file = Path(out) / LATENCY if out else None
    if "latency" in named:
        if latency is None and resume and table_file is not None and table_file.exists():
            latency = LatencyTable.load(table_file)
        latency = latency or measure(model, grain=config.solver.grain)
        latency.check(model)
    limits(model, budget, metric, latency)
    check_loader(train_loader)
    if latency is not None and table_file is not None:
        table_file.parent.mkdir(parents=True, exist_ok=True)
        table_file.write_text(latency.to_json())
    own_log = log is None
    log = log or RunLog(Path(out) if out else None)
    teacher = (copy.deepcopy(model) if teacher is None else teacher).eval().requires_grad_(False)
    dense_cost = cost(model, Structure.dense(model))
    file = Path(out) / "checkpoint.safetensors" if out else None
    trainer = Trainer(
        convert(model), train_loader, val_loader, config, log, file, budget=budget, metric=metric
    )
    if resume and file is not None and file.exists():
        trainer.load()
    set_seed(config.seed, bool(trainer.mix))
    method = METHODS[config.solver.method]
    method.prepare(model, config.solver)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(config.distill.kind != "none")

    task = Classification(config.label_smoothing, config.precision)
    if config.distill.kind != "none":
        settings = (teacher, config.distill, config.label_smoothing, config.precision)
        if teacher_cache is None:
            task = Distillation(*settings)
        else:
            mixing = {"mixup": config.mixup, "cutmix": config.cutmix}
            mixing |= {"seed": config.seed} if trainer.mix else {}
            task = cached(teacher_cache, train_loader, mixing, *settings)
    teacher_top1 = evaluate(teacher, val_loader)

    warmup, searching = config.warmup_epochs, config.search_epochs
    optimizer = trainer.optimizer(config.search_learning_rate)
    if not trainer.finished("search"):
        trainer.phase("warmup", warmup, task, optimizer, schedule=(0, warmup + searching))
        steps = searching * len(train_loader)
        search = method(model, budget, metric, steps, config.solver, config.seed, latency)
        trainer.phase("search", searching, task, optimizer, search, schedule=(warmup, warmup + searching))
        search.harden()
        before_post = evaluate(model, val_loader)
        trainer.history.append({"phase": "harden", "top1": before_post})
        log.note(event="harden", top1=before_post)
    else:
        apply_structure(model, Structure.from_json(trainer.resumed["structure"]))
        before_post = next(entry["top1"] for entry in trainer.history if entry["phase"] == "harden")

    # A fresh optimiser and a whole learning-rate cycle recover more than going on with the old ones.
    trainer.phase("post-train", config.post_epochs, task, trainer.optimizer(config.learning_rate))
    model.eval()
    if out:
        save(compact(model), out)
        (Path(out) / "structure.json").write_text(structure_of(model).to_json() + "\n")
    if own_log:
        log.close()
    return Result(
        model=model,
        structure=structure_of(model),
        cost=cost(model),
        dense_cost=dense_cost,
        teacher_top1=teacher_top1,
        before_post_top1=before_post,
        final_top1=evaluate(model, val_loader),
        steps=trainer.steps,
        history=trainer.history,
    )


def check_loader(loader: DataLoader) -> None:
    """ValueError unless ``loader`` says how many batches it has, and has one."""
    try:
        batches = len(loader)
    except TypeError:
        raise ValueError("train_loader: it has no length; the schedules need the number of batches") from None
    if batches == 0:
        raise ValueError("train_loader: it yields no batch; use a smaller batch size or more images")

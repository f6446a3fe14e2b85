"""Training loops: a teacher, and ``compress``: warm up, search, harden, post-train."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from uvc.budget import Cost, cost, limits, named_budgets
from uvc.checkpoint import save
from uvc.compact import compact
from uvc.config import Config
from uvc.latency import LatencyTable, measure
from uvc.layers import convert
from uvc.report import RunLog
from uvc.run_state import (
    load_optimizer_tensors,
    load_run,
    numpy_random,
    optimizer_tensors,
    save_run,
    set_numpy_random,
    set_seed,
)
from uvc.solver import METHODS, Search, check_tokens
from uvc.solver.project import check_grain
from uvc.structure import Structure, apply_structure, structure_of
from uvc.task import Classification, Distillation, Mixing

LOG_EVERY = 5  # steps
AVERAGED = ("teacher", "post-train")  # phases whose structure stays
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


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device | str | None = None) -> float:
    """Top-1 accuracy in percent over ``loader``, in eval mode; the model's mode is restored."""
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    right = total = 0
    for images, labels in loader:
        right += int((model(images.to(device)).argmax(-1) == labels.to(device)).sum())
        total += len(labels)
    model.train(was_training)
    if total == 0:
        raise ValueError("val_loader: it yields no images; top-1 needs at least one")
    return 100.0 * right / total


class Trainer:
    """What the phases of a run share: model, loaders, log, checkpoint file, and its history by epoch."""

    def __init__(
        self,
        model: nn.Module,
        train: DataLoader,
        val: DataLoader,
        config: Config,
        log: RunLog,
        file: Path | None,
        **settings: Any,
    ) -> None:
        self.model, self.train_loader, self.val_loader, self.config, self.log, self.file = (
            model,
            train,
            val,
            config,
            log,
            file,
        )
        self.device = next(model.parameters()).device
        self.mix = Mixing(config, getattr(model, "num_classes", 0))
        if not 0.0 <= config.ema_decay < 1.0:
            raise ValueError(f"ema_decay: {config.ema_decay} is outside [0, 1); 0 turns averaging off")
        self.average: ModelEmaV3 | None = None  # of the weights, in the phases that have one
        self.settings = _json_like({**asdict(config), **settings})  # a checkpoint belongs to one set of them
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self.resumed: dict[str, Any] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Fresh AdamW; norms, biases and embeddings are not decayed."""
        decay = self.config.weight_decay
        return create_optimizer_v2(self.model, opt="adamw", lr=learning_rate, weight_decay=decay, fused=True)

    def phase(
        self,
        name: str,
        epochs: int,
        task: Classification,
        optimizer: torch.optim.Optimizer,
        search: Search | None = None,
        schedule: tuple[int, int] | None = None,
    ) -> None:
        """Trains for some epochs under one cosine cycle.

        schedule: (epochs before this phase, epochs in all) where several phases share the optimiser and its
        cycle.
        """
        if self.config.ema_decay and name in AVERAGED:
            self.average = ModelEmaV3(self.model, self.config.ema_decay, use_warmup=True)
        first = self._restore(name, epochs, optimizer, search)
        before, cycle = schedule or (0, epochs)
        steps = len(self.train_loader)
        scheduler = self._cosine(optimizer, cycle * steps)
        self.log.phase(name, epochs * steps)
        for epoch in range(first, epochs):
            start = time.perf_counter()
            self.model.train()
            for i, (images, labels) in enumerate(self.train_loader):
                step = epoch * steps + i
                scheduler.step_update(before * steps + step)
                out = self._train_step(task, images, labels, optimizer, search)
                if self.average:
                    self.average.update(self.model, step=step + 1)
                if step % LOG_EVERY == 0 or step + 1 == epochs * steps:
                    scalars = {"loss": out["loss"].item(), "lr": optimizer.param_groups[0]["lr"]}
                    self.log.step(step, **scalars, **(search.metrics() if search else {}))
                self.steps += 1
            seconds = time.perf_counter() - start
            entry = {
                "phase": name,
                "epoch": epoch,
                "top1": evaluate(self.average.module if self.average else self.model, self.val_loader),
                "step_ms": 1e3 * seconds / steps,
            }
            self.history.append({**entry, **(search.metrics() if search else {})})
            self.log.note(epoch=epoch, top1=entry["top1"], step_ms=entry["step_ms"])
            self._save(name, epoch + 1, optimizer, search)
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None

    def _train_step(
        self,
        task: Classification,
        images: Tensor,
        labels: Tensor,
        optimizer: torch.optim.Optimizer,
        search: Search | None,
    ) -> dict[str, Any]:
        if search:
            search.before()
        images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
        out = task(self.model, *self.mix(images, labels))
        out["loss"].backward()
        if search:
            search.observe()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        optimizer.step()
        if search:
            search.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return out

    def _cosine(self, optimizer: torch.optim.Optimizer, steps: int) -> CosineLRScheduler:
        config = self.config
        warmup = int(config.lr_warmup_fraction * steps)
        return CosineLRScheduler(
            optimizer,
            t_initial=max(steps, 1),
            lr_min=config.min_learning_rate,
            warmup_t=warmup,
            warmup_lr_init=config.min_learning_rate,
            warmup_prefix=False,
            t_in_epochs=False,
        )

    def _save(self, phase: str, epoch: int, optimizer: torch.optim.Optimizer, search: Search | None) -> None:
        if self.file is None:
            return
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(optimizer, self.model)}
        tensors["random"] = {"torch": torch.get_rng_state()}
        if self.mix:
            tensors["random"] |= numpy_random()
        if self.average:
            tensors["average"] = self.average.module.state_dict()
        if search:
            tensors["search"] = search.tensors()
        loader = self.train_loader.state_dict() if hasattr(self.train_loader, "state_dict") else None
        facts = {
            "phase": phase,
            "epoch": epoch,
            "loader": loader,
            "history": self.history,
            "steps": self.steps,
        }
        structure = structure_of(self.model).to_json() if phase == "post-train" else None
        save_run(self.file, tensors, {**facts, "structure": structure, "settings": self.settings})

    def load(self) -> None:
        """Reads the checkpoint; phases before the one it names are passed over, that one continues after its
        last epoch.
        """
        self.tensors, self.resumed = load_run(self.file)
        if self.resumed["settings"] != self.settings:
            raise ValueError(
                f"{self.file}: it was written with other settings; resume with the same ones or start afresh"
            )
        self.history, self.steps = self.resumed["history"], self.resumed["steps"]

    def finished(self, phase: str) -> bool:
        """Whether the loaded checkpoint is from a later phase."""
        order = ["teacher", "warmup", "search", "post-train"]
        return bool(self.resumed) and order.index(self.resumed["phase"]) > order.index(phase)

    def _restore(
        self, name: str, epochs: int, optimizer: torch.optim.Optimizer, search: Search | None
    ) -> int:
        if self.finished(name):
            return epochs
        if self.resumed.get("phase") != name:
            return 0
        self.model.load_state_dict(self.tensors["model"])
        load_optimizer_tensors(optimizer, self.model, self.tensors["optimizer"])
        if search:
            search.load_tensors(self.tensors["search"])
        torch.set_rng_state(self.tensors["random"]["torch"])
        if self.mix:
            set_numpy_random(self.tensors["random"])
        if self.average:
            self.average.module.load_state_dict(self.tensors["average"])
        if self.resumed["loader"] is not None:
            self.train_loader.load_state_dict(self.resumed["loader"])
        epoch, self.resumed, self.tensors = self.resumed["epoch"], {}, {}
        return epoch


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
    task = Classification(config.label_smoothing)
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
        latency: what prices latency, from ``uvc.latency.measure`` on the device that shall be fast; None =
            measured here and now, for batches of one image on the model's device.

    Raises:
        ValueError: a bad argument, named; a budget below the smallest reachable one, before any training.
    """
    config = config or Config()
    if config.solver.method not in METHODS:
        known = " and ".join(repr(name) for name in METHODS)
        raise ValueError(f"solver method: {config.solver.method!r}; known are {known}")
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
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(config.distill.kind != "none")

    task = Classification(config.label_smoothing)
    if config.distill.kind != "none":
        task = Distillation(teacher, config.distill, config.label_smoothing)
    teacher_top1 = evaluate(teacher, val_loader)

    warmup, searching = config.warmup_epochs, config.search_epochs
    optimizer = trainer.optimizer(config.search_learning_rate)
    if not trainer.finished("search"):
        trainer.phase("warmup", warmup, task, optimizer, schedule=(0, warmup + searching))
        make = METHODS[config.solver.method]
        steps = searching * len(train_loader)
        search = make(model, budget, metric, steps, config.solver, config.seed, latency)
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


def _json_like(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _json_like(item) for key, item in value.items()}
    return [_json_like(item) for item in value] if isinstance(value, (list, tuple)) else value

"""A teacher, and ``compress``: warm up, search, harden, post-train."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from uvc.compaction import compact, form_for
from uvc.config import Config
from uvc.costs import Cost, cost
from uvc.elastic import make_elastic, set_budget, structures_of
from uvc.io.files import make_folder, write_text
from uvc.io.serialization import save
from uvc.latency_table import LatencyTable
from uvc.layers import check, convert, set_tokens
from uvc.solver import Joint, method_of
from uvc.solver.elastic import from_bytes
from uvc.structure import Structure, apply_structure, structure_of
from uvc.training.checkpoint import has_run, set_seed
from uvc.training.freezing import freeze
from uvc.training.logger import RunLog
from uvc.training.losses import Classification, Distillation
from uvc.training.plan import Plan
from uvc.training.processes import ALONE, Alone, here
from uvc.training.teacher_cache import CachedDistillation
from uvc.training.trainer import Trainer, set_checkpointing
from uvc.training.user_loss import Loss, Score, UserLoss


@dataclass(frozen=True)
class Result:
    """What ``compress`` returns. model: converted, full-size weights, the final structure applied. Scores are
    top-1 in percent, or what ``evaluate`` returned: ``measure`` is "top1" or "score".
    """

    model: nn.Module
    structure: Structure
    cost: Cost
    dense_cost: Cost
    precision: str  # of the products in training
    teacher: nn.Module = field(repr=False)  # with a loss of one's own, a frozen copy of the dense model
    measure: str
    teacher_score: float
    before_post_score: float
    final_score: float
    steps: int
    history: list[dict[str, Any]] = field(repr=False)
    # Of several budgets each by its fraction, largest first; what stands above is of the largest.
    structures: dict[float, Structure] = field(default_factory=dict, repr=False)
    before_post_scores: dict[float, float] = field(default_factory=dict)
    final_scores: dict[float, float] = field(default_factory=dict)

    @property
    def teacher_top1(self) -> float:
        """Of the dense model; AttributeError where something else was measured, as with the other two."""
        return self._top1("teacher_score")

    @property
    def before_post_top1(self) -> float:
        """After the search."""
        return self._top1("before_post_score")

    @property
    def final_top1(self) -> float:
        """At the end."""
        return self._top1("final_score")

    def _top1(self, score: str) -> float:
        if self.measure != "top1":
            raise AttributeError(f"no top-1 was measured, as evaluate= was given; read {score}")
        return getattr(self, score)


def train_teacher(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    config: Config,
    log: RunLog,
    file: Path | None = None,
    processes: Alone = ALONE,
) -> float:
    """Trains a dense model on labels, in place, for ``config.teacher_epochs``; returns top-1 in percent."""
    freeze(model, config.freeze)
    trainer = Trainer(model, train_loader, val_loader, config, log, file, processes)
    if file is not None and has_run(file):
        trainer.load()
    set_seed(config.seed, bool(trainer.mix))
    processes.seed(config.seed)
    task = Classification(config.label_smoothing, config.precision)
    trainer.phase("teacher", config.teacher_epochs, task, trainer.optimizer(config.learning_rate))
    return trainer.evaluate(model)


def compress(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None = None,
    budget: float | Mapping[str, float] | Sequence[float] = 0.5,
    metric: str = "macs",
    teacher: nn.Module | None = None,
    config: Config | None = None,
    out: str | Path | None = None,
    log: RunLog | None = None,
    resume: bool = False,
    latency: LatencyTable | None = None,
    teacher_cache: str | Path | None = None,
    loss: Loss | None = None,
    evaluate: Score | None = None,
    tokens_per_image: int | None = None,
) -> Result:
    """Compresses a trained timm ViT to a budget: warm up, search, harden, post-train.

    Args:
        model: trained model; converted and trained in place.
        train_loader, val_loader: yield (images [B, C, H, W] float, labels [B] int64).
        budget: fraction in (0, 1] of the dense cost; the result costs at most that. Or several at once:
            {"macs": 0.5, "params": 0.6}. Or one model for several fractions, (0.7, 0.5, 0.33), largest first,
            to be switched by ``uvc.set_budget``.
        metric: "macs", "params" or "latency": what a single fraction counts.
        teacher: distilled from; None = a frozen copy of ``model`` as given.
        config: ``uvc.config.Config``; None = the default recipe.
        out: folder for log, checkpoint and, at the end, the compacted model (for ``uvc.load``) and
            structure.json; None = nothing is written.
        log: where to report; None = a new ``RunLog(out)``.
        resume: continue from the checkpoint in ``out``, if there is one.
        latency: what prices latency, from ``uvc.latency_table.measure`` on the target device; None =
            measured here and now, for batches of one image on the model's device.
        teacher_cache: folder that keeps the teacher's answers, for other budgets and resumed runs; only for
            loaders of ``uvc.training.data``; None = the teacher answers in every step.
        loss: ``loss(model, batch) -> {"loss": scalar, ...}`` in place of labels and distillation; batches are
            what ``train_loader`` yields, their tensors on the model's device; all numbers are logged.
        evaluate: ``evaluate(model) -> float``, higher is better, in place of top-1 over ``val_loader``, which
            may then be None; the model is in eval mode, without gradients.
        tokens_per_image: patch tokens for which costs are counted, of a model that takes images of any size;
            None = those of the size it was pretrained at.

    Under a launcher every process calls this, on its own device; batches are the global ones, rank 0 alone
    writes.

    Raises:
        ValueError: a bad argument, named; a budget below the smallest reachable one; a model that ``out``
            could not hold. All of it before any training.
    """
    check(model)
    if tokens_per_image is not None:
        set_tokens(model, tokens_per_image)
    processes = here(next(model.parameters()).device.type)
    plan = Plan(
        model,
        train_loader,
        val_loader,
        budget,
        metric,
        config or Config(),
        teacher,
        None if out is None else make_folder(Path(out), "out"),
        resume,
        latency,
        teacher_cache=None if teacher_cache is None else Path(teacher_cache),
        processes=processes,
        loss=loss,
        evaluate=evaluate,
    )
    if not processes.main:
        log = RunLog(None)
    with nullcontext(log) if log is not None else RunLog(plan.out) as log:
        plan.begin(log)
        return carry_out(plan, log)


def carry_out(plan: Plan, log: RunLog) -> Result:
    """`compress`, once its arguments have been checked and the plan has begun."""
    model, config, out = plan.model, plan.config, plan.out
    plan.processes.copy(model)
    teacher = copy.deepcopy(model) if plan.teacher is None else plan.teacher
    teacher.eval().requires_grad_(False)
    freeze(model, config.freeze)
    dense_cost = cost(model, Structure.dense(model))
    trainer = _trainer(plan, log)
    with plan.processes.in_turn():
        task = _task(plan, trainer.model, teacher)
    teacher_score = trainer.evaluate(teacher)
    before_post = (_searched if trainer.finished("search") else _search)(plan, trainer, task)
    structures = structures_of(trainer.model)
    # A fresh optimiser and a whole learning-rate cycle recover more than going on with the old ones.
    optimizer = trainer.optimizer(config.learning_rate)
    joint = Joint(trainer.model, structures) if structures else None
    trainer.phase("post-train", config.post_epochs, task, optimizer, joint)
    plan.processes.gather(trainer.model, model)
    model.eval()
    if config.grad_checkpointing:
        set_checkpointing(model, False)
    if out and plan.processes.main:
        save(model if structures else compact(model, form_for(trainer.device)), out)
        write_text(out / "structure.json", structure_of(model).to_json() + "\n")
    plan.processes.wait()
    scores = _scores(plan, trainer)
    return Result(
        model=model,
        structure=structure_of(model),
        cost=cost(model),
        dense_cost=dense_cost,
        precision=config.precision,
        teacher=teacher,
        measure=trainer.measure,
        teacher_score=teacher_score,
        before_post_score=next(iter(before_post.values())),
        final_score=next(iter(scores.values())),
        steps=trainer.steps,
        history=trainer.history,
        structures=structures,
        before_post_scores=before_post if structures else {},
        final_scores=scores if structures else {},
    )


def _trainer(plan: Plan, log: RunLog) -> Trainer:
    """One of the converted model, or of its twin that is spread, where a run to resume has stopped."""
    file = plan.out / "checkpoint.safetensors" if plan.out else None
    model, prepare = convert(plan.model), method_of(plan.config.solver.method).prepare
    spread = plan.config.fsdp and plan.processes.count > 1
    if spread:
        prepare(model, plan.config.solver)
        model = plan.processes.spread(model)
    trainer = Trainer(
        model,
        plan.train_loader,
        plan.val_loader,
        plan.config,
        log,
        file,
        plan.processes,
        plan.evaluate,
        budget=plan.budget,
        metric=plan.metric,
        **({} if plan.loss is None else {"loss": "own"}),
    )
    if plan.resume and file is not None and has_run(file):
        trainer.load()
    set_seed(plan.config.seed, bool(trainer.mix))
    plan.processes.seed(plan.config.seed)
    if not spread:
        prepare(model, plan.config.solver)
    return trainer


def _task(plan: Plan, model: nn.Module, teacher: nn.Module) -> Classification | UserLoss:
    """What the model learns: labels, and from the teacher unless distillation is off; or the user's loss."""
    config = plan.config
    if plan.loss is not None:
        return UserLoss(plan.loss, config.precision)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(config.distill.kind != "none")
    if config.distill.kind == "none":
        return Classification(config.label_smoothing, config.precision)
    if plan.teacher_cache is not None:
        return CachedDistillation(teacher, config, plan.teacher_cache, plan.train_loader)
    mean = plan.processes.mean
    return Distillation(teacher, config.distill, config.label_smoothing, config.precision, mean)


def _scores(plan: Plan, trainer: Trainer) -> dict[float | None, float]:
    """The score at each budget; the model ends at the largest."""
    if not plan.elastic:
        return {None: trainer.evaluate(trainer.model)}
    found = {budget: trainer.evaluate(set_budget(trainer.model, budget)) for budget in plan.stages}
    set_budget(trainer.model, next(iter(found)))
    return found


def _search(plan: Plan, trainer: Trainer, task: Classification | UserLoss) -> dict[float | None, float]:
    """Warms up, searches and hardens; returns the scores before post-training, by budget."""
    model, config = trainer.model, plan.config
    warmup, searching = config.warmup_epochs, config.search_epochs
    optimizer = trainer.optimizer(config.search_learning_rate)
    trainer.phase("warmup", warmup, task, optimizer, schedule=(0, warmup + searching))
    steps = searching * len(plan.train_loader)
    pruner = plan.pruner(model, steps)
    trainer.phase("search", searching, task, optimizer, pruner, schedule=(warmup, warmup + searching))
    pruner.harden()
    if plan.elastic:
        make_elastic(model, pruner.structures())
    scores = _scores(plan, trainer)
    for budget, score in scores.items():
        said = {trainer.measure: score, **({} if budget is None else {"budget": budget})}
        trainer.history.append({"phase": "harden", **said})
        trainer.log.note(event="harden", **said)
    return scores


def _searched(plan: Plan, trainer: Trainer, task: Any) -> dict[float | None, float]:
    """Applies what `_search` had found before the run was interrupted; returns its scores."""
    if plan.elastic:
        make_elastic(trainer.model, from_bytes(trainer.tensors["search"]["structures"]))
    else:
        apply_structure(trainer.model, Structure.from_json(trainer.resumed["structure"]))
    entries = [entry for entry in trainer.history if entry["phase"] == "harden"]
    return {entry.get("budget"): entry[trainer.measure] for entry in entries}

"""A teacher, and ``compress``: warm up, search, harden, post-train."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from uvc.compaction import compact, form_for
from uvc.config import Config, named_budgets, nested_budgets
from uvc.constraints import Limit, check_multiples, limits
from uvc.costs import Cost, cost
from uvc.elastic import make_elastic, set_budget, structures_of
from uvc.io.files import make_folder, write_text
from uvc.io.serialization import describe, save
from uvc.latency_table import LatencyTable, measure
from uvc.layers import check, check_children, convert, set_tokens
from uvc.solver import Joint, NestedSearch, Pruner, method_of
from uvc.solver.elastic import from_bytes
from uvc.structure import Structure, apply_structure, structure_of
from uvc.training import multiples
from uvc.training.checkpoint import check_room, has_run, set_seed
from uvc.training.checks import check_dtype, check_loader, check_nested, check_spread, check_teacher
from uvc.training.compiling import check_compile
from uvc.training.freezing import freeze, frozen
from uvc.training.logger import RunLog
from uvc.training.losses import Classification, Distillation
from uvc.training.precision import PRECISION, Precision, settle
from uvc.training.processes import ALONE, Alone, here
from uvc.training.teacher_cache import CachedDistillation, check_cache
from uvc.training.trainer import Trainer, set_checkpointing
from uvc.training.user_loss import Loss, Score, UserLoss, check_user_loss, plain

LATENCY = "latency.json"  # the table, in the folder of a run


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


@dataclass(frozen=True)
class Plan:
    """The arguments of `compress`, checked as they are put together: nothing is refused later. ValueError for
    what cannot be done. A latency table is measured where one is needed and none is at hand, for batches of
    `latency_batch` images; so is the precision that training is fastest in, and `config` names it.
    """

    model: nn.Module
    train_loader: DataLoader
    val_loader: DataLoader | None
    budget: float | Mapping[str, float] | Sequence[float]
    metric: str
    config: Config
    teacher: nn.Module | None = None
    out: Path | None = None
    resume: bool = False
    latency: LatencyTable | None = None
    latency_batch: int | None = None
    teacher_cache: Path | None = None
    processes: Alone = ALONE
    loss: Loss | None = None
    evaluate: Score | None = None
    # What each budget comes to, largest first; None, where there is but one.
    stages: dict[float | None, tuple[Limit, ...]] = field(init=False)
    precision: Precision = field(init=False)
    sizes: multiples.Multiples | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        method, budgets = method_of(config.solver.method), nested_budgets(self.budget)
        named = named_budgets(budgets[0], self.metric)
        if len(budgets) > 1:
            check_nested(
                config, budgets, len(self.train_loader) if hasattr(self.train_loader, "__len__") else 0
            )
        if self.latency is not None and "latency" not in named:
            raise ValueError('latency: a table is given, but no budget is in it; add metric="latency"')
        check(model)
        check_children(model)  # what the final compaction would refuse
        check_dtype(model, "model")
        if config.solver.round_to == "auto":
            config = self._with_multiples()
        check_multiples(model, config.solver.round_to)
        check_loader(self.train_loader)
        if self.val_loader is None and self.evaluate is None:
            raise ValueError(
                "val_loader: none given; give one for top-1, or evaluate= for a score of your own"
            )
        if self.loss is not None:
            check_user_loss(config, self.teacher, self.teacher_cache)
            config = plain(config)
            object.__setattr__(self, "config", config)
        self.processes.check(self.train_loader, bool(config.mixup or config.cutmix), model)
        if self.teacher is not None:
            check_teacher(model, self.teacher, config.distill)
            check_dtype(self.teacher, "teacher")
        if self.out is not None:
            describe(model)  # what could not be saved is refused now, not after the training
            # An average, and the weights at each budget but the last.
            check_room(self.out, model, bool(config.ema_decay) + len(budgets) - 1)
        check_compile(config.compile, next(model.parameters()).device)
        if config.fsdp:
            check_spread(config, len(budgets))
        with frozen(model, config.freeze):
            # One process measures for all.
            found = self.processes.told(lambda: json.dumps(self._settled()._asdict()))
        precision = Precision(**json.loads(found))
        object.__setattr__(self, "precision", precision)
        object.__setattr__(self, "config", replace(config, precision=precision.used))
        if self.teacher_cache is not None:
            check_cache(self.teacher_cache, self.train_loader, self.config, self.teacher)
        if "latency" in named:
            found = self.processes.told(lambda: self._latency_table().to_json())
            object.__setattr__(self, "latency", LatencyTable.from_json(found))
        found = [limits(model, budget, self.metric, self.latency) for budget in budgets]
        names = budgets if len(budgets) > 1 else (None,)
        object.__setattr__(self, "stages", dict(zip(names, found, strict=True)))
        with frozen(model, config.freeze):
            for stage in found:
                method.check(model, stage, config.solver)

    @property
    def elastic(self) -> bool:
        """Whether there are several budgets."""
        return None not in self.stages

    def pruner(self, model: nn.Module, steps: int) -> Pruner:
        """What finds the structure of a model, or the structures, in so many steps."""
        solver, seed = self.config.solver, self.config.seed
        if self.elastic:
            return NestedSearch(model, self.stages, steps, solver, seed)
        return method_of(solver.method)(model, self.stages[None], steps, solver, seed)

    def _with_multiples(self) -> Config:
        """The config with multiples that were measured here, or that the run to resume has."""
        out, batch = self.out if self.resume else None, self.latency_batch or 1
        told = self.processes.told(lambda: json.dumps(multiples.settle(self.model, batch, out)._asdict()))
        object.__setattr__(self, "sizes", multiples.Multiples.from_data(json.loads(told)))
        object.__setattr__(self, "config", multiples.with_multiples(self.config, self.sizes))
        return self.config

    def _settled(self) -> Precision:
        if self.loss is not None:  # its steps are not those that are measured
            return Precision(self.config.precision, self.config.precision)
        return settle(self.model, self.train_loader, self.config, self.out if self.resume else None)

    def _latency_table(self) -> LatencyTable:
        """The one that is given, that of the run to resume, or one measured here."""
        table = self.latency
        if table is None and self.resume and self.out and (self.out / LATENCY).exists():
            table = LatencyTable.load(self.out / LATENCY)
        table = table or measure(self.model, self.latency_batch or 1, self.config.solver.round_to)
        table.check(self.model)
        return table

    def begin(self, log: RunLog) -> None:
        """Keeps what was measured in the folder of the run, and says it once."""
        precision, out = self.precision, self.out
        if not self.processes.main:
            return
        log.configure({"budget": self.budget, "metric": self.metric, **asdict(self.config)})
        if self.latency is not None and out:
            write_text(out / LATENCY, self.latency.to_json())
        if self.sizes is not None:
            if out:
                multiples.save(self.sizes, out)
            log.note(event="multiples", **self.sizes._asdict())
            log.say(self.sizes.line)
        if precision.asked == "float32" or (self.resume and out and (out / PRECISION).exists()):
            return
        if out:
            precision.save(out)
        log.note(event="precision", **precision._asdict())
        if precision.slower:
            warnings.warn(precision.line, stacklevel=2)
        elif precision.line:
            log.say(precision.line)


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

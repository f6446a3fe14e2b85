"""The arguments of a run, checked before any training, and what is measured for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from uvc.config import Config, named_budgets, nested_budgets
from uvc.constraints import Limit, check_multiples, limits
from uvc.io.files import write_text
from uvc.io.serialization import describe
from uvc.latency_table import LatencyTable, measure
from uvc.layers import check, check_children
from uvc.solver import NestedSearch, Pruner, method_of
from uvc.training import multiples
from uvc.training.checkpoint import check_room
from uvc.training.checks import check_dtype, check_loader, check_nested, check_spread, check_teacher
from uvc.training.compiling import check_compile
from uvc.training.freezing import frozen
from uvc.training.logger import RunLog
from uvc.training.precision import PRECISION, Precision, settle
from uvc.training.processes import ALONE, Alone
from uvc.training.teacher_cache import check_cache
from uvc.training.user_loss import Loss, Score, check_user_loss, plain

LATENCY = "latency.json"  # the table, in the folder of a run


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

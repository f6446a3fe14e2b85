"""The training loop that every phase of a run goes through, with its log, its history and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from uvc.config import Config
from uvc.solver import Pruner
from uvc.solver.rows import is_spread, whole
from uvc.training.batches import moved, rows_of
from uvc.training.compiling import Compiled
from uvc.training.evaluation import check_size, evaluate, input_dtype, targets, unpack
from uvc.training.feed import Feed
from uvc.training.finite import FiniteCheck
from uvc.training.freezing import train_mode
from uvc.training.graphs import Captured, CapturedUpdate
from uvc.training.logger import Rate, RunLog
from uvc.training.losses import Classification, Distillation, Mixing
from uvc.training.processes import ALONE, Alone
from uvc.training.resuming import Resumable
from uvc.training.signals import Stopped, asked
from uvc.training.user_loss import Score, UserLoss, scalars_of, score_of

LOG_EVERY = 5  # steps
Part = tuple[float, tuple[Any, ...]]  # share of its batch, and what a task takes of it beside the model
REPEATABLE = (Classification, Distillation)  # losses of the model and the batch alone
AVERAGED = ("teacher", "post-train")  # phases whose structure stays


class Trainer(Resumable):
    """What the phases of a run share: model, loaders, log, checkpoint file, and its history by epoch."""

    def __init__(
        self,
        model: nn.Module,
        train: DataLoader,
        val: DataLoader,
        config: Config,
        log: RunLog,
        file: Path | None,
        processes: Alone = ALONE,
        score: Score | None = None,
        **settings: Any,
    ) -> None:
        """score: of a model, higher is better; None: top-1 on the validation images."""
        super().__init__(model, config, file, processes, settings)
        self.log, self.score = log, score
        self.measure = "top1" if score is None else "score"  # its name in history and log
        self.train_loader = processes.share(train, True)
        self.val_loader = val if score is not None else processes.share(val, False)
        self.device, self.dtype = next(model.parameters()).device, input_dtype(model)
        self.mix = Mixing(config, getattr(model, "num_classes", 0))
        processes.compare(lambda: {"the version of torch": torch.__version__, **self.settings})
        processes.settle("before training")
        processes.copy(model)
        if config.grad_checkpointing:
            set_checkpointing(model, True)
        self.reduction = processes.reduction(model)
        self.compiled = Compiled(model, config.compile)
        self.captured = Captured.on(model, alone=processes.count == 1 and config.compile is None)
        self.update = CapturedUpdate(self.captured.graphs, config.clip_grad)
        self.feed = Feed(self.train_loader, self.device)
        self.rate = Rate()

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Fresh AdamW; norms, biases and embeddings are not decayed."""
        decay = self.config.weight_decay
        return create_optimizer_v2(self.model, opt="adamw", lr=learning_rate, weight_decay=decay, fused=True)

    def phase(
        self,
        name: str,
        epochs: int,
        task: Classification | UserLoss,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner | None = None,
        schedule: tuple[int, int] | None = None,
    ) -> None:
        """Trains for some epochs under one cosine cycle.

        pruner: removes structure meanwhile; None: nothing does.
        schedule: (epochs before this phase, epochs in all) where several phases share the optimiser and its
        cycle.
        """
        pruner = pruner or Pruner(self.model)
        if self.config.ema_decay and name in AVERAGED:
            self.average = ModelEmaV3(self.model, self.config.ema_decay, use_warmup=True)
        first, done = self._restore(name, epochs, optimizer, pruner)
        before, cycle = schedule or (0, epochs)
        steps = len(self.train_loader)
        scheduler = self._cosine(optimizer, cycle * steps)
        self.log.phase(name, epochs * steps)
        check = FiniteCheck(self.model, name, self._kept)
        with self.checkpoints:
            for epoch in range(first, epochs):
                start, self.rate = time.perf_counter(), Rate()
                train_mode(self.model)
                had = done
                batches = self.feed.epoch(done) if done < steps else ()
                for i, batch in enumerate(batches, done):
                    step = epoch * steps + i
                    scheduler.step_update(before * steps + step)
                    check.at(epoch, i)
                    with self.reduction.guard(), self.compiled.step():
                        loss, also = self._train_step(task, batch, optimizer, pruner, check)
                    if self.average:
                        self.average.update(self.model, step=step + 1)
                    if step % LOG_EVERY == 0 or step + 1 == epochs * steps:
                        check.read()
                        scalars = {"loss": loss.item(), "lr": optimizer.param_groups[0]["lr"]}
                        scalars |= {name: float(value) for name, value in also.items()}
                        self.log.step(step, **scalars, **pruner.metrics(), images_s=self.rate.read())
                    self.steps += 1
                    done = i + 1
                    if done == steps:
                        continue
                    stop, late = self.processes.joined(self._flags())
                    if stop:
                        break
                    every = self.config.checkpoint_every
                    if late or (every and (step + 1) % every == 0):
                        check.read()
                        self._save(name, epoch, optimizer, pruner, done)
                check.read()
                with self.processes.in_turn():
                    task.end_epoch()
                seconds = time.perf_counter() - start
                if self.reduction.early:
                    # An evaluation gathers kept weights, which only equal structures may.
                    self.processes.compare(lambda: self._facts(pruner), self._flags())
                    self.processes.settle(check.where())
                if self.processes.joined(self._flags())[0]:
                    self._save(name, epoch, optimizer, pruner, done)
                    raise Stopped(f"stopped in {name}, epoch {epoch}, after {done} of {steps} batches")
                entry = {
                    "phase": name,
                    "epoch": epoch,
                    self.measure: self.evaluate(self.average.module if self.average else self.model),
                    "step_ms": 1e3 * seconds / max(done - had, 1),
                }
                self.history.append({**entry, **pruner.metrics()})
                said = {self.measure: entry[self.measure], "step_ms": entry["step_ms"]}
                self.log.note(epoch=epoch, **said)
                self._save(name, epoch + 1, optimizer, pruner)
                done = 0
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None

    def _train_step(
        self,
        task: Classification | UserLoss,
        batch: Any,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner,
        check: FiniteCheck,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Returns the loss of the whole batch, and what else a user's loss says in numbers."""
        self.rate.add(rows_of(batch) * self.processes.count)
        scale = self.scale.state()
        if task.labelled:
            parts, images = self._labelled(batch)
        else:
            parts, images = [(1.0, (moved(batch, self.device),))], None
        while True:
            pruner.before()
            self.processes.compare(lambda: self._facts(pruner), self._flags())
            loss, also = self._gradients(task, parts, pruner, check)
            if self.scale.fits(self.model.parameters()):
                break
            optimizer.zero_grad(set_to_none=True)
        if self.skipped < self.config.skip_not_finite and not check.finite(loss):
            self._pass_over(loss, optimizer, pruner, check, scale)
            return loss, also
        pruner.observe(self.scale.value)
        self.scale.unscale(self.model.parameters())
        norm = self.update.step(optimizer, self.captured.static)
        updated = norm is not None
        if not updated:
            norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad))
        check.see(loss, norm, images)
        if not updated:
            optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return loss, also

    def _pass_over(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner,
        check: FiniteCheck,
        scale: list[float],
    ) -> None:
        """Ends a step whose loss or gradients are not finite: they reach neither weights nor importance.

        scale: of the loss, before the step: that it was lowered has not helped.
        """
        self.skipped += 1
        self.scale.load_state(scale)
        optimizer.zero_grad(set_to_none=True)
        pruner.forget()
        pruner.step(optimizer)
        number = f"{self.skipped} of {self.config.skip_not_finite}"
        self.log.note(event="skipped", epoch=check.epoch, batch=check.batch, loss=float(loss))
        self.log.say(f"{check.where()}: not finite, the step is skipped ({number})")

    def _labelled(self, batch: Any) -> tuple[list[Part], Tensor]:
        """The parts of a batch of (images, labels), each with its share of it, and all of its images."""
        images, labels = unpack(batch, "train_loader")
        check_size(self.model, images, "train_loader")
        labels = targets(labels, self.mix.num_classes, "train_loader").to(self.device, non_blocking=True)
        images = images.to(self.device, self.dtype, non_blocking=True)
        shown = getattr(self.train_loader, "shown", None)
        seed = None if shown is None else hash((self.config.seed, shown.epoch, shown.batch))
        images, labels = self.mix(images, labels, seed)
        size = -(-len(images) // self.config.accumulate)
        parts = zip(images.split(size), labels.split(size), strict=True)
        return [(len(part[0]) / len(images), part) for part in parts], images

    def _gradients(
        self, task: Classification | UserLoss, parts: list[Part], pruner: Pruner, check: FiniteCheck
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The gradients of the global batch, from a mean over parts and over processes; returns its loss, and
        what else a user's loss says in numbers.
        """
        if type(task) in REPEATABLE and len(parts) == pruner.passes == 1:
            pruner.turn(0)
            loss = self.captured.gradients(parts[0][1], (task, self.scale.value), self._plain(task))
            if loss is not None:
                return loss, {}
        whole, also = 0.0, {}
        for number, (share, part) in enumerate(parts, 1):
            for turn in range(pruner.passes):
                pruner.turn(turn)
                first, last = number + turn == 1, number == len(parts) and turn == pruner.passes - 1
                if first and self.reduction.early:
                    self.processes.settle(check.where())
                found = task(self.model, *part)
                loss = found["loss"] * share
                whole = whole + loss.detach()
                also = {} if task.labelled else scalars_of(found)
                if last:
                    # Only what runs the same structure everywhere may be reduced.
                    if not self.reduction.early:
                        self.processes.settle(check.where())
                    self.reduction.begin()
                self.scale.backward(loss)
        self.reduction.finish([whole, *pruner.evidence()])
        return whole, also

    def _plain(self, task: Classification) -> Callable[[Tensor, Tensor], Tensor]:
        """Gradients of one whole batch in one pass, and its loss, in one process."""

        def run(images: Tensor, labels: Tensor) -> Tensor:
            loss = task(self.model, images, labels)["loss"]
            self.scale.backward(loss)
            return loss.detach()

        return run

    def _facts(self, pruner: Pruner) -> dict[str, Any]:
        """What is equal in all processes at the beginning of a step."""
        return {
            "steps": self.steps,
            "loss scale": self.scale.state(),
            **self.reduction.facts(),
            **pruner.facts(),
        }

    def _flags(self) -> tuple[bool, bool]:
        """Whether the run is asked to end, and whether a checkpoint is due."""
        minutes = self.config.checkpoint_minutes
        return asked(), 0 < minutes <= (time.monotonic() - self.saved) / 60

    def evaluate(self, model: nn.Module) -> float:
        """Top-1 in percent of a model on the validation images, or its score by the user's own measure."""
        with self.reduction.guard():
            if self.score is None:
                return evaluate(model, self.val_loader, total=self.processes.total)
            if is_spread(next(model.parameters())):  # which all must run
                found = repr(score_of(self.score, model))
                return float(self.processes.told(lambda: found))
            # Rank 0 measures for all.
            return float(self.processes.told(lambda: repr(score_of(self.score, model))))

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


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Whether blocks are computed again in the backward pass; ValueError for a model that cannot."""
    try:
        model.set_grad_checkpointing(on)
    except (AttributeError, AssertionError):
        raise ValueError(
            f"grad_checkpointing: {type(model).__name__} does not offer it; leave it out"
        ) from None

"""`python -m bench.real.tried DIR` runs what was tried after the search, on `tune`: rows of tried.csv.

Variants that differ in post-training alone begin with the same searched weights, in one process. Run from
the repository root, after `python -m bench.real fetch DIR`.
"""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from bench.quality.harness import append
from bench.quality.report import read_rows
from bench.real.arms import RealContext, macs_of
from bench.real.pictures import count
from bench.real.setup import VERSION, Setup
from bench.real.teacher import teacher
from uvc.compaction import compact
from uvc.config import Config
from uvc.environment import commit, processor, versions_line
from uvc.training.checkpoint import set_seed
from uvc.training.compress import _task, _trainer
from uvc.training.logger import RunLog
from uvc.training.plan import Plan
from uvc.training.trainer import Trainer

TRIED = Path(__file__).with_name("tried.csv")
SEED = 0


@dataclass(frozen=True)
class Search:
    """Warm-up and search. cycle: epochs of the learning-rate cycle that they are the beginning of."""

    epochs: int = 3
    cycle: int = 3
    reached: float = 0.7  # share of the search after which the budget is reached


@dataclass(frozen=True)
class Post:
    """Post-training. goes_on: in the cycle of the search, else in one of its own."""

    goes_on: bool = False
    kept: bool = False  # the optimiser of the search, without a second warm-up of the rate
    decay: float | None = None  # of the rate from block to block, from the last one back
    average: float = 0.0  # decay of averaged weights
    features: bool = False  # distance of every block's output to the teacher's, in the first half


TWO, ONE = Search(), Search(cycle=6)
RUNS: dict[Search, dict[str, Post]] = {
    TWO: {
        "uvc": Post(),
        "uvc_kept_optimizer": Post(kept=True),
        "uvc_layer_decay": Post(decay=0.8),
        "uvc_averaged": Post(average=0.98),
        "uvc_features": Post(features=True),
    },
    ONE: {"uvc_one_cycle": Post(goes_on=True, kept=True), "uvc_one_cycle_fresh": Post(goes_on=True)},
    replace(ONE, reached=0.35): {"uvc_one_cycle_early": Post(goes_on=True, kept=True)},
    Search(epochs=4, cycle=4): {"uvc_four_two": Post()},
}
SIX = 6  # epochs of every run


class Blocks:
    """What the blocks of a model return, [B, N, D] each."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, output: self.outputs.append(output))


class Features:
    """A task, and the mean over blocks of the squared distance to the teacher's, relative to its square."""

    labelled = True

    def __init__(self, task, model: nn.Module, of: nn.Module, until: int) -> None:
        """until: the step at which the distance is no more looked at."""
        self.task, self.until, self.steps, self.of = task, until, 0, copy.deepcopy(of)
        self.mine, self.its = Blocks(model), Blocks(self.of)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict:
        self.mine.outputs.clear()
        found = self.task(model, images, labels)
        if self.steps < self.until:
            self.its.outputs.clear()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                self.of(images)
            pairs = zip(self.mine.outputs, self.its.outputs, strict=True)
            away = [(a.float() - b).square().sum() / b.square().sum() for a, b in pairs]
            found = {**found, "loss": found["loss"] + torch.stack(away).mean()}
        self.steps += 1
        return found

    def end_epoch(self) -> None:
        self.task.end_epoch()


def run(setup: Setup, budget: float, search: Search, posts: dict[str, Post], file: Path) -> None:
    """One search, then each post-training on a copy of its end; a row each, as `run` of `harness` has it."""
    weights, known = teacher(setup, SEED)
    config = replace(setup.seeded(SEED), search_epochs=search.epochs, post_epochs=SIX - search.epochs)
    config = replace(config, solver=replace(config.solver, anneal=(config.solver.anneal[0], search.reached)))
    context = RealContext(setup, SEED, budget, weights)
    model = copy.deepcopy(context.dense)
    context.dense.requires_grad_(False)
    args = (model, context.batches, context.val, budget, "macs", config, context.dense)
    plan = Plan(*args, out=None, resume=False, latency=None, teacher_cache=context.answers)
    start, cpu = time.monotonic(), time.process_time()
    with RunLog(None) as log:
        plan.begin(log)
        trainer = _trainer(plan, log)
        task = _task(plan, trainer.model, context.dense)
        optimizer = trainer.optimizer(config.search_learning_rate)
        steps = search.epochs * len(context.batches)
        pruner = plan.pruner(trainer.model, steps)
        trainer.phase("search", search.epochs, task, optimizer, pruner, (0, search.cycle))
        pruner.harden()
        before = trainer.evaluate(trainer.model)
        end = copy.deepcopy(
            (trainer.model.state_dict(), optimizer.state_dict(), context.batches.state_dict())
        )
        searched = (time.monotonic() - start, time.process_time() - cpu)
        for name, post in posts.items():
            print(f"{name} {budget}: {before:.2f}", flush=True)
            start, cpu = time.monotonic(), time.process_time()
            trainer.model.load_state_dict(end[0])
            context.batches.load_state_dict(end[2])
            set_seed(SEED, False)
            fresh = after(trainer, config, post)
            if post.kept:
                fresh.load_state_dict(end[1])
                for group in fresh.param_groups:
                    group["initial_lr"] = config.learning_rate
            extra = (
                Features(task, trainer.model, context.dense, steps_of(config, context) // 2)
                if post.features
                else task
            )
            schedule = (search.epochs, search.cycle) if post.goes_on else None
            trainer.phase("post-train", config.post_epochs, extra, fresh, None, schedule)
            seconds = (time.monotonic() - start, time.process_time() - cpu)
            row = {
                "arm": name,
                "budget": budget,
                "before_top1": before,
                "after_top1": trainer.evaluate(trainer.model),
                "macs_ratio": macs_of(compact(trainer.model)) / macs_of(context.dense),
                "params_ratio": parameters(compact(trainer.model)) / parameters(context.dense),
                "teacher_top1": context.top1(context.dense),
                "seconds": searched[0] + seconds[0],
                "cpu_seconds": searched[1] + seconds[1],
            }
            write(setup, config, known, row, file)


def steps_of(config: Config, context: RealContext) -> int:
    """Steps of post-training."""
    return config.post_epochs * len(context.batches)


def parameters(model: nn.Module) -> int:
    """How many."""
    return sum(parameter.numel() for parameter in model.parameters())


def after(trainer: Trainer, config: Config, post: Post) -> torch.optim.Optimizer:
    """The optimiser of post-training, and the trainer set as it asks."""
    trainer.config = replace(
        config,
        ema_decay=post.average,
        lr_warmup_fraction=0.0 if post.kept and not post.goes_on else config.lr_warmup_fraction,
    )
    if post.decay is None:
        return trainer.optimizer(config.learning_rate)
    settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay, layer_decay=post.decay)
    return create_optimizer_v2(trainer.model, opt="adamw", fused=True, **settings)


def write(setup: Setup, config: Config, known: dict, found: dict, file: Path) -> None:
    """Appends a row."""
    train, val = count(setup.data)
    row = {
        "part": setup.part,
        "seed": SEED,
        "learning_rate": config.learning_rate,
        "search_learning_rate": config.search_learning_rate,
        "search_epochs": config.search_epochs,
        "post_epochs": config.post_epochs,
        "probe_top1": known["probe_top1"],
        "train_images": train,
        "val_images": val,
        "teacher_learning_rate": setup.teacher_rate,
        "teacher_epochs": config.teacher_epochs,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "crop_scale": setup.views.scale[0],
        "threads": config.threads,
        "device": processor(),
        "versions": versions_line(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "version": VERSION,
        **found,
    }
    fields = TRIED.read_text().splitlines()[0].split(",")
    append([{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}], file, fields)
    print(f"{row['arm']} {row['budget']}: {row['before_top1']:.2f} -> {row['after_top1']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real.tried", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=float, default=0.33)
    parser.add_argument("--results", type=Path, default=TRIED)
    options = parser.parse_args()
    setup = Setup(options.folder.absolute(), "tune")
    torch.set_num_threads(setup.config.threads)
    done = {(row["part"], row["arm"], float(row["budget"])) for row in read_rows(options.results, VERSION)}
    for search, posts in RUNS.items():
        left = {name: post for name, post in posts.items() if ("tune", name, options.budget) not in done}
        if left:
            run(setup, options.budget, search, left, options.results)


if __name__ == "__main__":
    main()

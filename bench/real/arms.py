"""The arms on real pictures: UVC by the command line, and the rivals of bench/quality in the same setting."""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from bench.quality import arms as quality
from bench.quality.context import COMPUTE_SCORING, Context, Meter, Trace, macs_of
from bench.quality.harness import epoch_macs
from bench.real.setup import VERSION, Setup
from bench.real.teacher import teacher
from uvc.training.signals import Stopped, asked
from uvc.training.teacher_cache import CachedDistillation

TEACHER = 1 / 3  # one epoch of the teacher's answers, in epochs of training the dense model
RIVALS = ("global_taylor", "global_taylor_rescored", "tp_isomorphic", "dense_extra")
ARMS = ("uvc", *RIVALS)
# Has rows at equal compute, as it can score on fewer pictures; the others cost more than UVC as they are.
AT_ONCE = ("global_taylor",)


class RealContext(Context):
    """What a rival of bench/quality gets, for a teacher and pictures of a setup."""

    def __init__(self, setup: Setup, seed: int, budget: float, weights: Path) -> None:
        self.setup, self.seed, self.budget, self.weights = setup, seed, budget, weights
        self.config, self.scoring = setup.seeded(seed), 1.0
        self.meter, self.log, self.answers = Meter(), Trace(), setup.answers(seed)
        data = setup.loaders(seed)
        self.batches, self.test, self.classes = data.train, data.val, data.num_classes
        self.val = self.test  # which the trainer reports on; nothing is chosen by it

    @cached_property
    def dense(self) -> nn.Module:
        """The teacher as it was trained; not to be changed."""
        model = self.setup.build(self.classes)
        model.load_state_dict(load_file(self.weights))
        return model.eval()

    @property
    def teacher(self) -> nn.Module:
        """The same."""
        return self.dense

    def loss(self) -> CachedDistillation:
        """Distillation that reads the teacher's answers where an arm of this seed has left them."""
        return CachedDistillation(self.teacher, self.config, self.answers, self.batches)

    def post_train(self, model: nn.Module, epochs: int) -> nn.Module:
        """As for every rival, on the pictures that the last epochs of UVC have, in their order; more epochs
        than UVC's begin with its first.
        """
        everything = self.config.search_epochs + self.config.post_epochs
        self.batches.load_state_dict({"epoch": max(everything - epochs, 0), "batch": 0})
        return super().post_train(model, epochs)


def rival(
    setup: Setup, arm: str, seed: int, budget: float, compute: float | None = None
) -> dict[str, object]:
    """A row's measurements of a rival: structure, then post-training for the epochs that are left.

    compute: if given, what the row may cost, in epochs of training the dense model; then the scores are those
    of part of an epoch, and an epoch that begins within the bill is run whole.
    """
    weights, _ = teacher(setup, seed)
    context = RealContext(setup, seed, budget, weights)
    how, config = quality.ARMS[arm], context.config
    if compute is not None:
        context.scoring = COMPUTE_SCORING
    start, cpu = time.monotonic(), time.process_time()
    model = how.make(context)
    before, ratio = context.top1(model), context.ratio(model)
    spent = context.meter.macs / epoch_macs(context)
    seen = config.search_epochs if how.search else context.scoring if spent else 0.0
    if arm == "tp_isomorphic":
        spent = seen = 1.0  # it scores on all pictures, with a copy that the meter does not see
    spent += TEACHER * seen
    if compute is None:
        epochs = config.post_epochs + (0 if how.search else config.search_epochs)
    else:
        epochs = max(math.ceil((compute - spent) / (ratio + TEACHER)), 1)
    model = context.post_train(model, epochs)
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    return {
        "search_epochs": config.search_epochs if how.search else 0,
        "post_epochs": epochs,
        "train_compute": spent + epochs * (ratio + TEACHER),
        "macs_ratio": macs_of(model) / macs_of(context.dense),
        "params_ratio": _params(model) / _params(context.dense),
        "teacher_top1": context.top1(context.dense),
        "before_top1": before,
        "after_top1": context.top1(model),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def uvc(setup: Setup, seed: int, budget: float) -> dict[str, object]:
    """The same of `uvc compress`, run as a user runs it; one that was stopped is resumed."""
    weights, _ = teacher(setup, seed)
    config = setup.seeded(seed)
    epochs = f"{config.search_epochs}+{config.post_epochs}"
    name = f"{setup.part}-{seed}-{budget:g}-{config.learning_rate:g}-{epochs}-{VERSION}"
    out = setup.folder / "runs" / name
    begun = (out / "run.json").is_file()
    options = ["--resume"] if begun else command(setup, seed, budget, weights)
    with timed(out.with_name(f"{out.name}.seconds")) as seconds:
        said = run_to_end([sys.executable, "-m", "uvc", "compress", *options, "--out", str(out), "--quiet"])
    if not (out / "summary.json").is_file():
        raise RuntimeError(f"uvc compress --out {out}: {said}")
    summary = json.loads((out / "summary.json").read_text())
    return {
        "search_epochs": config.search_epochs,
        "post_epochs": config.post_epochs,
        "train_compute": config.search_epochs * cost_of_search(out / "log.jsonl")
        + config.post_epochs * summary["macs_ratio"]
        + TEACHER * (config.search_epochs + config.post_epochs),
        "macs_ratio": summary["macs_ratio"],
        "params_ratio": summary["final_params"] / summary["dense_params"],
        "teacher_top1": summary["teacher_top1"],
        "before_top1": summary["before_post_top1"],
        "after_top1": summary["final_top1"],
        **seconds,
    }


def cost_of_search(log: Path) -> float:
    """Mean cost of the model while it was searched, over the dense one's."""
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.fmean(
        step["hard_cost"] for step in steps if step.get("phase") == "search" and "step" in step
    )


def run_to_end(program: list[str]) -> str:
    """Runs a command, which is asked to stop when this process is; returns what it said on its stderr."""
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while True:
            try:
                _, said = child.communicate(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                if asked():
                    child.terminate()
    if asked():
        raise Stopped(said.strip())
    return said.strip()


def command(setup: Setup, seed: int, budget: float, weights: Path) -> list[str]:
    """The options of `uvc compress` for the settings of a row."""
    config = setup.seeded(seed)
    options = {
        "model": setup.model,
        "model-arg": f"img_size={setup.size}",
        "data": setup.data,
        "teacher": weights,
        "teacher-cache": setup.answers(seed),
        "teacher-epochs": 0,  # the teacher is given; the order of pictures begins with that of epoch 0
        "scale": setup.views.scale,
        "budget": budget,
        "warmup-epochs": config.warmup_epochs,
        "search-epochs": config.search_epochs,
        "post-epochs": config.post_epochs,
        "batch-size": config.batch_size,
        "lr": config.learning_rate,
        "search-lr": config.search_learning_rate,
        "precision": config.precision,
        "threads": config.threads,
        "seed": seed,
    }
    words = {name: value if isinstance(value, tuple) else (value,) for name, value in options.items()}
    return [text for name, values in words.items() for text in (f"--{name}", *map(str, values))]


@contextmanager
def timed(file: Path) -> Iterator[dict[str, float]]:
    """Seconds on the clock, and of processor time of the commands run within, filled in at the end, however
    it comes, on top of those of earlier sessions, which `file` keeps.
    """
    found = json.loads(file.read_text()) if file.is_file() else {"seconds": 0.0, "cpu_seconds": 0.0}
    start, before = time.monotonic(), _of_children()
    try:
        yield found
    finally:
        found["seconds"] += time.monotonic() - start
        found["cpu_seconds"] += _of_children() - before
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

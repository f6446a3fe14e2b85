"""What every arm of the bench gets, so that all have the same: data, teacher, settings, training and its
bill.
"""

from __future__ import annotations

import copy
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import uvc.models  # noqa: F401  registers the small ViT
from bench.quality.tasks import Batches, Remembered, Split, Task
from uvc.compaction import compact
from uvc.config import Config, SolverConfig
from uvc.costs import Prices, count_macs, counts, prices, total
from uvc.layers import convert
from uvc.structure import Structure, structure_of
from uvc.training.compress import train_teacher
from uvc.training.data import TensorLoader
from uvc.training.evaluation import evaluate
from uvc.training.logger import RunLog
from uvc.training.losses import Classification, Distillation
from uvc.training.trainer import Trainer

CACHE = Path("runs/quality")
# One setting for all tasks, arms and budgets. Warm-up, search and post-training together are EPOCHS.
EPOCHS, SEARCH_EPOCHS = 15, 3
CONFIG = Config(
    teacher_epochs=20,
    warmup_epochs=0,
    search_epochs=SEARCH_EPOCHS,
    post_epochs=EPOCHS - SEARCH_EPOCHS,
    batch_size=64,
    learning_rate=2e-3,
    search_learning_rate=1e-3,
    lr_warmup_fraction=0.1,
    threads=1,
    solver=SolverConfig(tokens=1),
)
# Equal total training compute: what this many dense epochs cost, forward and backward.
COMPUTE_EPOCHS = 4.0
# There a search is one epoch long (on validation images no worse than three, which leave less for
# post-training, or than half of one), and one shot scores on part of an epoch.
COMPUTE_SEARCH_EPOCHS, COMPUTE_SCORING = 1, 0.25
WIDTH, DEPTH, HEADS = 48, 6, 3


def build(task: Task, width: int = WIDTH) -> nn.Module:
    """An untrained ViT for a task."""
    shape = dict(img_size=task.size, patch_size=task.patch, embed_dim=width, depth=DEPTH, num_heads=HEADS)
    shape["num_classes"] = task.classes
    return timm.create_model("uvc_vit_digits", **shape)


class Meter:
    """Bill of the training steps of one arm, in MACs: three times the forward pass, skips and all as they
    ran.
    """

    def __init__(self) -> None:
        self.macs, self._handle = 0.0, None

    def watch(self, model: nn.Module) -> nn.Module:
        """Counts from here on what `model` costs in training mode, and no other model; returns it."""
        self.stop()
        fixed = None if converted(model) else macs_of(model)
        priced: dict[tuple, Prices] = {}  # by the tokens that go on from each block

        def skipped(module: nn.Module) -> float:
            structure = structure_of(module)
            tokens = tuple(block.tokens for block in structure.blocks)
            if tokens not in priced:
                priced[tokens] = prices(module, "macs", structure)
            return total(priced[tokens], counts(structure))

        def count(module: nn.Module, args: tuple) -> None:
            if module.training and torch.is_grad_enabled():
                self.macs += 3.0 * (skipped(module) if fixed is None else fixed) * len(args[0])

        self._handle = model.register_forward_pre_hook(count)
        return model

    def stop(self) -> None:
        """Counts no more: a copy of the model would take the hook along."""
        if self._handle is not None:
            self._handle.remove()


def converted(model: nn.Module) -> bool:
    """Whether structure is skipped on the fly."""
    return all(hasattr(block, "skip_attn") for block in model.blocks)


def macs_of(model: nn.Module) -> int:
    """MACs per image of any model, by torch's flop counter."""
    return count_macs(model, blank(model))


def blank(model: nn.Module) -> Tensor:
    """An empty image [1, C, H, W] of the size that a ViT takes."""
    embed = model.patch_embed
    return torch.zeros(1, embed.proj.in_channels, *embed.img_size)


class Trace(RunLog):
    """A log that writes nothing and keeps what a search logs, a dict per logged step."""

    def __init__(self) -> None:
        super().__init__(None)
        self.searched: list[dict[str, float]] = []

    def step(self, step: int, **scalars: float) -> None:
        if self._phase == "search":
            self.searched.append({"step": step, **scalars})


@dataclass
class Context:
    """One row of the bench: a task, a seed, a budget, and what an arm may use."""

    task: Task
    seed: int
    budget: float
    frugal: bool = False  # what comes before post-training is short, as its compute counts
    answers: Path | None = None  # folder of the teacher's answers, where `teacher` does not remember them

    def __post_init__(self) -> None:
        self.config = replace(CONFIG, seed=self.seed)
        self.scoring = 1.0
        if self.frugal:
            self.config = replace(self.config, search_epochs=COMPUTE_SEARCH_EPOCHS)
            self.scoring = COMPUTE_SCORING
        train, val, test = self.task.draw()
        self.train, self.meter, self.log = train, Meter(), Trace()
        self.batches = Batches(train, self.config.batch_size, self.seed)
        self.val, self.test = loader(val), loader(test)

    @cached_property
    def _taught(self) -> tuple[nn.Module, Tensor]:
        return teacher_of(self.task, self.seed, self.config, self.train, self.val)

    @property
    def dense(self) -> nn.Module:
        """The trained dense model, from the cache or trained now; not to be changed."""
        return self._taught[0]

    @cached_property
    def teacher(self) -> Remembered:
        """The dense model, frozen, with its answers on the training images in memory."""
        return Remembered(copy.deepcopy(self.dense), self._taught[1], self.batches)

    def student(self) -> nn.Module:
        """A converted copy of the dense model, on the bill."""
        return self.meter.watch(convert(copy.deepcopy(self.dense)))

    def loss(self) -> Classification:
        """The task object that every arm trains on."""
        distill, common = self.config.distill, (self.config.label_smoothing, self.config.precision)
        return (
            Classification(*common)
            if distill.kind == "none"
            else Distillation(self.teacher, distill, *common)
        )

    def trainer(self, model: nn.Module) -> Trainer:
        """uvc's own training loop, for any arm."""
        return Trainer(model, self.batches, self.val, self.config, self.log, None)

    def post_train(self, model: nn.Module, epochs: int) -> nn.Module:
        """A fresh optimiser and a whole learning-rate cycle on the physically small model, which is
        returned.
        """
        self.meter.stop()
        model = self.meter.watch(compact(model) if converted(model) else model)
        torch.manual_seed(self.seed)
        trainer = self.trainer(model)
        trainer.phase("post-train", epochs, self.loss(), trainer.optimizer(self.config.learning_rate))
        return model.eval()

    def top1(self, model: nn.Module, part: str = "test") -> float:
        """Percent right on "test" or "val"."""
        return evaluate(model, getattr(self, part))

    def ratio(self, model: nn.Module) -> float:
        """Cost of a model over that of the dense one, in MACs."""
        return macs_of(compact(model) if converted(model) else model) / macs_of(self.dense)

    def ratio_of(self, structure: Structure) -> float:
        """Cost of a structure over the dense one's, in MACs."""
        return total(self.prices, counts(structure)) / total(self.prices, counts(Structure.dense(self.dense)))

    @cached_property
    def prices(self) -> Prices:
        """What each part of the dense model costs in MACs."""
        return prices(self.dense, "macs")


def loader(split: Split) -> TensorLoader:
    """Evaluation batches."""
    return TensorLoader(split.images, split.labels, 500)


def teacher_of(
    task: Task, seed: int, config: Config, train: Split, val: TensorLoader
) -> tuple[nn.Module, Tensor]:
    """The dense model of a task and a seed and its logits on the training images.

    Trained once, by one process, then read from `CACHE`.
    """
    torch.manual_seed(seed)
    model = build(task)
    CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / f"{task.name}-{seed}-{config.teacher_epochs}.safetensors"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            train_teacher(model, Batches(train, config.batch_size, seed), val, config, RunLog(None))
            model.eval()
            with torch.no_grad():
                logits = torch.cat([model(part) for part in train.images.split(500)])
            part = file.with_suffix(".part")
            save_file({**model.state_dict(), "logits": logits}, part)
            part.rename(file)
    tensors = load_file(file)
    logits = tensors.pop("logits")
    model.load_state_dict(tensors)
    return model.eval(), logits


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file lock; other processes wait."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def accept(task: Task, seed: int = 0) -> dict:
    """The rule for a task: dense >= 85%, and 5 points above a small net from scratch at equal epochs.

    The small net has the MACs of budget 0.15 or less, trains on labels as the dense net does, as many epochs.
    """
    context = Context(task, seed, 0.15)
    dense = context.top1(context.dense)
    torch.manual_seed(seed)
    small = build(task, narrow_width(context))
    train_teacher(
        small,
        Batches(context.train, context.config.batch_size, seed),
        context.val,
        context.config,
        context.log,
    )
    scratch = context.top1(small)
    return {
        "task": task.name,
        "seed": seed,
        "epochs": context.config.teacher_epochs,
        "dense_top1": round(dense, 2),
        "small_top1": round(scratch, 2),
        "small_macs_ratio": round(context.ratio(small), 4),
        "accepted": dense >= 85.0 and dense >= scratch + 5.0,
    }


def narrow_width(context: Context) -> int:
    """The widest uniformly narrow ViT (width a multiple of the heads) within the budget."""
    for width in range(WIDTH, 0, -HEADS):
        if context.ratio(build(context.task, width)) <= context.budget:
            return width
    raise ValueError(f"budget: {context.budget} leaves no ViT of {HEADS} heads")


def write_acceptance(rows: list[dict], file: Path) -> None:
    """Leaves what the rule found beside the results, in the place of what it found of these before."""
    before = json.loads(file.read_text()) if file.exists() else []
    found = {(row["task"], row["seed"]): row for row in [*before, *rows]}
    file.write_text(json.dumps(list(found.values()), indent=1) + "\n")

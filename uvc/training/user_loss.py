"""A loss and a score of the user's own in place of labels and top-1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uvc.config import Config
from uvc.training.losses import DTYPES

Loss = Callable[[nn.Module, Any], Mapping[str, Any]]
Score = Callable[[nn.Module], float]
TAKEN = ("lr", "phase", "step", "images_s")  # names that a line of the log has already


class UserLoss:
    """``loss(model, batch)`` as a task of the training loop; in 16 bits all of it runs under autocast."""

    labelled = False  # a batch is whatever the loader yields

    def __init__(self, loss: Loss, precision: str = "float32") -> None:
        self.loss, self.half = loss, DTYPES[precision]

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """What the loss returns, checked: ValueError unless its "loss" is a scalar with a gradient."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            found = self.loss(model, batch)
        if not isinstance(found, Mapping) or "loss" not in found:
            names = (
                f"a dict of {', '.join(map(str, found)) or 'nothing'}" if isinstance(found, Mapping) else ""
            )
            raise ValueError(
                f'loss: it returned {names or "a " + type(found).__name__}; return {{"loss": scalar, ...}}'
            )
        loss = found["loss"]
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            given = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f'loss: its "loss" is {given}; return a floating-point tensor of one number')
        if not loss.requires_grad:
            raise ValueError(
                'loss: its "loss" has no gradient; compute it from what the model returns, without '
                "torch.no_grad, detach or item"
            )
        if taken := [name for name in TAKEN if name in found]:
            raise ValueError(f"loss: {taken[0]!r} is a name of the log; return that number under another one")
        return {**found, "loss": loss.reshape(())}

    def end_epoch(self) -> None:
        """Called at the end of each epoch, and where a run is stopped."""


def check_user_loss(config: Config, teacher: Any, teacher_cache: Any) -> None:
    """ValueError for what says how labels are learnt, where a loss of the user's own is given."""
    if teacher is not None or teacher_cache is not None:
        name = "teacher" if teacher is not None else "teacher_cache"
        raise ValueError(f"{name}: with loss= distillation is the loss's own; ask the teacher in there")
    asked = [n for n in ("mixup", "cutmix", "label_smoothing") if getattr(config, n)]
    asked += ["accumulate"] if config.accumulate > 1 else []
    if asked:
        raise ValueError(
            f"{asked[0]}: {getattr(config, asked[0])}, but with loss= it must be in the loss itself"
        )
    if config.precision == "auto":
        raise ValueError("precision: 'auto' measures steps with labels; with loss= name one")


def plain(config: Config) -> Config:
    """`config` without the teacher that a loss of the user's own does not have."""
    return replace(config, distill=replace(config.distill, kind="none", features=0.0))


def scalars_of(found: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """The numbers among what a loss returns, by name, "loss" aside."""
    named = {name: value for name, value in found.items() if name != "loss"}
    return {
        name: value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def score_of(evaluate: Score, model: nn.Module) -> float:
    """What ``evaluate(model)`` says of a model in eval mode, without gradients; its mode is restored.

    ValueError unless that is a finite number.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = evaluate(model)
    finally:
        model.train(was_training)
    try:
        score = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"evaluate: it returned a {type(found).__name__}; return a number") from None
    if not math.isfinite(score):
        raise ValueError(f"evaluate: it returned {score}; return a finite number, higher is better")
    return score

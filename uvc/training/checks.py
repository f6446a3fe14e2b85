"""What does not go together in a run: a ValueError each, its name and the remedy, before any training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from uvc.config import Config, DistillConfig
from uvc.io.dtypes import input_dtype


def check_spread(config: Config, budgets: int) -> None:
    """ValueError for what copies a model or reads weights that no process has whole."""
    asked = {
        f"solver method: {config.solver.method!r}": config.solver.method != "uvc",
        f"solver tokens: {config.solver.tokens}": config.solver.tokens > 0,  # priced by a copy of the model
        f"ema_decay: {config.ema_decay}": config.ema_decay > 0,
        f"budget: {budgets} of them": budgets > 1,
    }
    if found := [what for what, is_asked in asked.items() if is_asked]:
        raise ValueError(f"{found[0]}, but with fsdp no process has whole weights; leave one of them out")


def check_nested(config: Config, budgets: Sequence[float], batches: int) -> None:
    """ValueError for what several budgets in one model cannot have."""
    if config.solver.method != "uvc":
        raise ValueError(
            f"solver method: {config.solver.method!r} finds one structure; for several budgets use 'uvc'"
        )
    if config.solver.tokens:
        raise ValueError(
            f"solver tokens: {config.solver.tokens} blocks may drop some; several budgets keep all, use 0"
        )
    if batches and config.search_epochs * batches < len(budgets):
        raise ValueError(
            f"search_epochs: {config.search_epochs} of {batches} batches are fewer steps than {len(budgets)} "
            "budgets; give more"
        )


def check_teacher(model: nn.Module, teacher: nn.Module, config: DistillConfig) -> None:
    """ValueError unless a model can learn what a teacher's classifier says and, if asked for, reads."""
    if config.kind == "none":
        return
    mine, its = (getattr(m, "num_classes", None) for m in (model, teacher))
    if None not in (mine, its) and mine != its:
        raise ValueError(f"teacher: it has {its} classes, the model {mine}; take one with these classes")
    mine, its = (getattr(getattr(m, "head", None), "in_features", None) for m in (model, teacher))
    if config.features and mine != its:
        raise ValueError(
            f"distill features: the model's are {mine} wide, the teacher's {its}; take a teacher as wide as "
            "the model, or features 0"
        )


def check_dtype(model: nn.Module, name: str) -> None:
    """ValueError unless a model takes float32 images, as loaders give them."""
    if (dtype := input_dtype(model)) != torch.float32:
        raise ValueError(
            f"{name}: its weights are {str(dtype).removeprefix('torch.')}, training keeps float32; give "
            f"{name}.float(), and 16 bits of products as Config.precision"
        )


def check_loader(loader: DataLoader) -> None:
    """ValueError unless ``loader`` says how many batches it has, and has one."""
    try:
        batches = len(loader)
    except TypeError:
        raise ValueError("train_loader: it has no length; the schedules need the number of batches") from None
    if batches == 0:
        raise ValueError("train_loader: it yields no batch; use a smaller batch size or more images")

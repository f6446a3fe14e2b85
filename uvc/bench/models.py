"""One group of whole models: built, found to agree, their steps and the least work of each."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from uvc_kernels import by_preference

from uvc.bench.layer_variants import backends, forced
from uvc.bench.roofline import Work, model_work, solver_work
from uvc.bench.steps import (
    Step,
    images_and_labels,
    inference,
    precision,
    removing,
    searching,
    solving,
    standing_mib,
    training,
)
from uvc.bench.variants import PRUNED, Built, Left, build, compiled, fault_of, gate

FLY_COMPILED = "on_the_fly/compiled"
# What may be timed on the fly besides a plain training step.
BESIDE = {"with_solver": searching, "solver": solving, "solver_removing": removing}


class Models(NamedTuple):
    """The steps of one group, by variant. `error`: the worst difference among the pruned variants.

    `standing`: MiB that stay between steps, see `standing_mib`.
    """

    steps: dict[str, Step]
    works: dict[str, Work]
    standing: dict[str, float]
    backends: dict[str, str]
    left: list[Left]
    error: float


def models(
    name: str,
    phase: str,
    keep: float,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    variants: Sequence[str],
    beside: Sequence[str] = (),
) -> Models:
    """Everything to time one phase of timm's model `name`. RuntimeError when pruned variants do not agree.

    `beside`: of `BESIDE`, what is also timed on the fly in training: a step with the solver beside it, the
    solver alone. "on_the_fly" runs with the backend that the library chooses ("auto"), on a GPU with each
    that can serve, and where "compiled" is asked for with its blocks under torch.compile as well.
    """
    training_phase = phase == "training"
    built, left = build(name, keep, batch, device, variants)
    x, y = images_and_labels(built["dense"].model, batch, device)
    error = agree({variant: b.model for variant, b in built.items() if variant in PRUNED}, x, y, dtype)
    chosen: dict[str, str] = {}
    if "on_the_fly" in built:
        fly = built.pop("on_the_fly")
        able, without = backends("attention", device, dtype)
        left += without
        forced_ones = [name for name in able if name != "reference"] if device.type == "cuda" else []
        names = [f"on_the_fly/{backend}" for backend in ["auto", *forced_ones]]
        names += [f"{variant}/auto" for variant in beside if training_phase]
        for variant in names:
            chosen[variant] = variant.partition("/")[2]
            built[variant] = fly._replace(model=copy.deepcopy(fly.model))
        if "compiled" in built:
            chosen[FLY_COMPILED] = "compiled"
            small = copy.deepcopy(fly.model)
            with torch.no_grad():
                small(x[:1])  # what is kept is listed on the device before anything is traced
            built[FLY_COMPILED] = fly._replace(model=compiled(small))
    steps = {}
    for variant, b in built.items():
        if not training_phase:
            step = inference(b.model, x, dtype)
        else:
            step = BESIDE.get(variant.partition("/")[0], training)(b.model, x, y, dtype)
        steps[variant] = forced(step, chosen[variant]) if variant in chosen else step
    for variant in ("compiled", FLY_COMPILED):
        if variant not in steps:
            continue
        steps[variant] = by_preference()(steps[variant])
        if fault := fault_of(partial(steps[variant], 0)):
            del steps[variant], built[variant]
            left.append(Left(variant, fault))
    works = {variant: work(variant, b, dtype, training_phase) for variant, b in built.items()}
    standing = {variant: standing_mib(b.model, training_phase) for variant, b in built.items()}
    return Models(steps, works, standing, chosen, left, error)


def work(variant: str, built: Built, dtype: torch.dtype, training_phase: bool) -> Work:
    """The least work of a model's step; AdamW goes over all the parameters that the variant has."""
    if variant.startswith("solver"):
        return solver_work(built.shape, len(built.kept))
    params = sum(p.numel() for p in built.model.parameters())
    return model_work(built.shape, built.kept, dtype.itemsize, training_phase, params, built.full)


def agree(pruned: dict[str, nn.Module], x: Tensor, y: Tensor, dtype: torch.dtype) -> float:
    """The worst relative difference of the pruned variants in logits and the gradient of the first norm."""
    if len(pruned) < 2:
        return float("nan")
    # Some images say as much as all of them.
    x, y = x[:8], y[:8]
    logits, gradients = {}, {}
    for variant, model in pruned.items():
        weight = model.blocks[0].norm1.weight
        with precision(x, dtype):
            out = model.eval()(x).float()
        (gradients[variant],) = torch.autograd.grad(F.cross_entropy(out, y), [weight])
        logits[variant] = out.detach()
    return max(gate(logits, dtype, "logits"), gate(gradients, dtype, "the gradient of the first norm"))

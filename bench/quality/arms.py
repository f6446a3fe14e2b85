"""The arms: each turns the dense model of a context into a model within the budget. The harness trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from bench.quality import gates, pruning, rivals
from bench.quality.context import HEADS, WIDTH, Context, build, narrow_width
from uvc.config import DistillConfig
from uvc.training.compress import compress


@dataclass(frozen=True)
class Arm:
    """One way to meet a budget.

    make: from a context to a model, before post-training. search: epochs of the common number that it uses
    up. scratch: it starts afresh, so the teacher's epochs are added to its post-training. budgeted: False
    for the dense control, which has one row (budget 1) per task and seed. distill: False trains on labels
    alone.
    """

    make: Callable[[Context], nn.Module]
    search: bool = False
    scratch: bool = False
    budgeted: bool = True
    distill: bool = True


def uvc(context: Context, **solver: object) -> nn.Module:
    """`uvc.compress`, stopped before its post-training. solver: settings of the solver to change; its
    `method` names a rival's.
    """
    return _compress(context, context.student(), context.budget, context.config.search_epochs, **solver)


def _compress(context: Context, model: nn.Module, budget: float, epochs: int, **solver: object) -> nn.Module:
    config = context.config
    config = replace(config, search_epochs=epochs, post_epochs=0, solver=replace(config.solver, **solver))
    teacher = context.teacher if config.distill.kind != "none" else context.dense
    args = (model, context.batches, context.val, budget, "macs", teacher, config)
    return compress(*args, teacher_cache=context.answers, log=context.log).model


def only(*families: str) -> Callable[[Context], nn.Module]:
    """UVC that removes groups of these families, and skips."""
    return lambda context: uvc(context, families=families)


def prune_then_skip(context: Context) -> nn.Module:
    """UVC in two runs that share the epochs: width to the root of the budget, then halves to the budget."""
    return _sequence(context, dict(skip="none", tokens=0), dict(families=()))


def skip_then_prune(context: Context) -> nn.Module:
    """The same, halves first."""
    return _sequence(context, dict(families=(), tokens=0), dict(skip="none"))


def _sequence(context: Context, first: dict, second: dict) -> nn.Module:
    epochs = context.config.search_epochs
    model = _compress(context, context.student(), context.budget**0.5, (epochs + 1) // 2, **first)
    return _compress(context, model, context.budget, epochs // 2, **second)


def uniform_width(context: Context) -> nn.Module:
    """A ViT that is narrow everywhere, residual stream too, from scratch."""
    torch.manual_seed(context.seed)
    return build(context.task, narrow_width(context))


def uniform_depth(context: Context) -> nn.Module:
    """The first blocks that fit, from scratch."""
    model = rivals.drop_last_k(context)
    torch.manual_seed(context.seed + 1)
    model.load_state_dict(build(context.task).state_dict())
    return model


def dense_extra(context: Context) -> nn.Module:
    """The dense model, for the same extra epochs."""
    return context.student()


ARMS: dict[str, Arm] = {
    "uvc": Arm(uvc, search=True),
    "global_taylor": Arm(rivals.global_taylor),
    "global_taylor_rescored": Arm(lambda c: uvc(c, method="global_taylor_rescored"), search=True),
    "drop_last_k": Arm(rivals.drop_last_k),
    "dense_extra": Arm(dense_extra, budgeted=False),
    "tp_isomorphic": Arm(pruning.isomorphic),
    "tp_magnitude": Arm(pruning.magnitude),
    "tp_taylor": Arm(pruning.taylor),
    "best_subset": Arm(rivals.best_subset),
    "uniform_width": Arm(uniform_width, scratch=True),
    "uniform_depth": Arm(uniform_depth, scratch=True),
    "global_taylor_balanced": Arm(lambda c: uvc(c, method="global_taylor_balanced"), search=True),
    "stochastic_gates": Arm(lambda c: uvc(c, method=gates.NAME), search=True),
    "random_structure": Arm(rivals.random_structure),
    "uvc_no_tokens": Arm(lambda c: uvc(c, tokens=0), search=True),
    "uvc_no_balance": Arm(lambda c: uvc(c, balance=False), search=True),
    "uvc_no_skip": Arm(lambda c: uvc(c, skip="none"), search=True),
    "uvc_heads_whole": Arm(
        lambda c: uvc(c, families=("v", "neuron"), round_to=(WIDTH // HEADS, 1)), search=True
    ),
    "uvc_no_heads": Arm(only("neuron"), search=True),
    "uvc_no_neurons": Arm(only("qk", "v"), search=True),
    "uvc_no_distill": Arm(uvc, search=True, distill=False),
    "prune_then_skip": Arm(prune_then_skip, search=True),
    "skip_then_prune": Arm(skip_then_prune, search=True),
    "published": Arm(lambda c: uvc(c, method="published"), search=True),
}
# Tried and not kept: their rows stay in the tables, their code in the history.
FORMER = (
    "uvc_whole_heads",
    "uvc_no_dims",
    "uvc_cross_terms",
    "uvc_activation_basis",
    "uvc_compensated",
    "uvc_fisher_probe",
    "uvc_one_cycle",
    "global_taylor_rescored_one_cycle",
)
MAIN = ("uvc", "global_taylor", "global_taylor_rescored", "tp_isomorphic", "drop_last_k", "dense_extra")


def context_of(arm: Arm, context: Context) -> Context:
    """The context with the arm's own loss."""
    if not arm.distill:
        context.config = replace(context.config, distill=DistillConfig(kind="none"))
    return context

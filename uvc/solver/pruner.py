"""What the training loop knows of a method that removes structure, and the methods by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uvc.config import SolverConfig
from uvc.constraints import Limit


class Pruner:
    """Removes structure from a model while it trains; this one removes nothing.

    A method is a subclass that overrides what it needs, under ``@method("name")``; ``SolverConfig(method=
    "name")`` chooses it. The training loop calls ``before`` the forward pass, ``observe`` after the backward
    pass, ``step`` after the optimiser's step, and ``harden`` once after the last step.

    Args:
        model: result of ``uvc.convert``.
        limits: the budgets, from ``uvc.constraints.limits``.
        steps: number of training steps of the search.
        config: solver settings.
        seed: of what is drawn at random.
    """

    def __init__(
        self,
        model: nn.Module,
        limits: Sequence[Limit] = (),
        steps: int = 1,
        config: SolverConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.limits = model, tuple(limits)
        self.steps, self.count = max(steps, 1), 0
        self.config = config or SolverConfig()

    @staticmethod
    def check(model: nn.Module, limits: Sequence[Limit], config: SolverConfig) -> None:
        """ValueError, in one line, for what this method cannot serve. Called before anything is trained."""

    @staticmethod
    def prepare(model: nn.Module, config: SolverConfig) -> None:
        """Changes a converted model before its first optimiser; its function stays."""

    @property
    def passes(self) -> int:
        """How often each batch goes through the model; the gradients add up."""
        return 1

    def turn(self, number: int) -> None:
        """Prepares the model for one of the passes of a step, 0 to ``passes`` - 1."""

    def before(self) -> None:
        """Prepares the model for the coming forward and backward pass; called anew where that is repeated."""

    def evidence(self) -> list[Tensor]:
        """What ``observe`` reads of a batch beside the gradients of the model's parameters: tensors, which
        become means over the processes, in place.
        """
        return []

    def observe(self, scale: float = 1.0) -> None:
        """Reads the gradients, which are ``scale`` times those of the loss."""

    def forget(self) -> None:
        """In place of ``observe`` where the gradients are not finite; ``step`` follows."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Changes weights or structure after a step of ``optimizer``."""

    def harden(self) -> None:
        """Gives the model its final structure, which costs at most what the limits allow."""

    def metrics(self) -> dict[str, float]:
        """Scalars for the log."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes from step to step, flat, for the checkpoint of an unfinished run."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What must be equal in all processes at the beginning of a step."""
        return self.state_dict()

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``; the model already holds its weights, its structure is set here."""


METHODS: dict[str, type[Pruner]] = {}
Method = TypeVar("Method", bound=type[Pruner])


def method(name: str) -> Callable[[Method], Method]:
    """Class decorator: ``SolverConfig(method=name)`` chooses this pruner."""

    def join(pruner: Method) -> Method:
        METHODS[name] = pruner
        return pruner

    return join


def method_of(name: str) -> type[Pruner]:
    """The pruner of that name; ValueError if there is none."""
    if name not in METHODS:
        known = ", ".join(repr(known) for known in sorted(METHODS))
        raise ValueError(f"solver method: {name!r}; known are {known}")
    return METHODS[name]

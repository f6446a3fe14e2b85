"""Structures that rivals choose: a global greedy by Taylor importance, whole blocks, chance.

L blocks, 2 L halves (attention, MLP).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.quality.context import Context
from uvc.config import SolverConfig
from uvc.constraints import Limit, limits
from uvc.solver import Groups, Pruner, State, method, round_to_budget
from uvc.solver.head_basis import balance_heads
from uvc.structure import Structure, apply_structure
from uvc.training.losses import Classification

RESCORES = 10


class Greedy(Pruner):
    """First-order importance (gradient of a gate of 1 on a group) per marginal MAC, summed over the batches
    observed; then one greedy over the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        limits: Sequence[Limit],
        steps: int = 1,
        config: SolverConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, limits, steps, config, seed)
        self.groups = Groups(model)
        self.state = State.new(self.groups.geometry)
        self.state.hard = True

    def observe(self, scale: float = 1.0) -> None:
        """Adds the squared first-order change of this batch's loss."""
        for name, value in self.groups.first_order().items():
            self.state.families[name].importance += (value / scale).square()

    def harden(self) -> None:
        """Removes the least important per MAC of what is left, down to the budget."""
        self.prune(self.limits)

    def prune(self, limits: Sequence[Limit]) -> None:
        """Removes the least important per MAC of what is left, and begins a new collection."""
        masks = round_to_budget(self.state, limits)
        self.groups.apply(masks)
        self.state.keep(masks)
        for family in self.state.families.values():
            family.importance.zero_()


@method("global_taylor_rescored")
class Rescored(Greedy):
    """The same greedy, scored again RESCORES times during a short search, in equal steps to the budget
    ("GT").
    """

    round = 0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Prunes when a tenth of the steps has passed."""
        self.count += 1
        due = self.count * RESCORES // self.steps
        if due > self.round:
            self.round = due
            self.prune([m._replace(budget=1.0 + (m.budget - 1.0) * due / RESCORES) for m in self.limits])

    def harden(self) -> None:
        """The last step met the budget."""


@method("global_taylor_balanced")
class Balanced(Rescored):
    """The re-scored greedy in UVC's basis of heads, which is no part of it: tells the basis from the
    solver.
    """

    @staticmethod
    def prepare(model: nn.Module, config: SolverConfig) -> None:
        """Gives the heads their balanced basis."""
        balance_heads(model)


def global_taylor(context: Context) -> nn.Module:
    """One shot: importance over one epoch of training images, or part of one, at the teacher's weights."""
    model = context.student()
    greedy, loss = Greedy(model, limits(model, context.budget)), context.loss()
    model.train()
    few = max(round(context.scoring * len(context.batches)), 1)
    for images, labels in itertools.islice(context.batches, few):
        loss(model, images, labels)["loss"].backward()
        greedy.observe()
        model.zero_grad(set_to_none=True)
    greedy.harden()
    return model


def random_structure(context: Context) -> nn.Module:
    """The greedy with importance drawn at random."""
    model = context.student()
    greedy = Greedy(model, limits(model, context.budget))
    generator = torch.Generator().manual_seed(context.seed)
    torch.rand(greedy.state.heads().shape, generator=generator)  # drawn for heads when rows were measured
    for family in greedy.state.families.values():
        family.importance.copy_(torch.rand(family.importance.shape, generator=generator))
    greedy.harden()
    return model


def drop_last_k(context: Context) -> nn.Module:
    """The first blocks that fit; of the next one its attention, if that fits too."""
    model = context.student()
    running = [False] * (2 * len(model.blocks))
    for half in range(len(running)):
        running[half] = True
        if context.ratio_of(halves(model, running)) > context.budget:
            running[half] = False
            break
    return apply_structure(model, halves(model, running))


def best_subset(context: Context) -> nn.Module:
    """The subset of halves, none of which can be added within the budget, with the smallest training loss.

    All of them on 64 images, then the best 16 on 1024.
    """
    model, loss = context.student().eval(), context.loss()
    fits = {
        running: context.ratio_of(halves(model, running)) <= context.budget
        for running in itertools.product((False, True), repeat=2 * len(model.blocks))
    }
    subsets = [r for r, fit in fits.items() if fit and not any(fits[more] for more in _one_more(r))]
    images, labels = next(iter(context.batches))
    split = context.train
    for batch in ((images, labels), (split.images[:1024], split.labels[:1024])):
        subsets = sorted(subsets, key=lambda running: _loss(model, running, loss, batch))[:16]
    return apply_structure(model, halves(model, subsets[0]))


def _one_more(running: tuple[bool, ...]) -> list[tuple[bool, ...]]:
    return [(*running[:i], True, *running[i + 1 :]) for i, runs in enumerate(running) if not runs]


@torch.no_grad()
def _loss(
    model: nn.Module, running: tuple[bool, ...], loss: Classification, batch: tuple[Tensor, Tensor]
) -> float:
    apply_structure(model, halves(model, running))
    return float(loss(model, *batch)["loss"])


def halves(model: nn.Module, running: list[bool] | tuple[bool, ...]) -> Structure:
    """The dense structure with only some halves running: attention and MLP of block 0, of block 1, ..."""
    pairs = zip(running[::2], running[1::2], strict=True)
    blocks = Structure.dense(model).blocks
    return Structure(tuple(replace(b, attn=a, mlp=m) for b, (a, m) in zip(blocks, pairs, strict=True)))

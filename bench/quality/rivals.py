"""Structures that rivals choose: a global greedy by Taylor importance, whole blocks, chance.

L blocks, 2 L halves (attention, MLP).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.quality.context import Context
from uvc.constraints import Limit
from uvc.costs import prices
from uvc.solver.head_basis import balance_heads
from uvc.solver.objective import masks_cost
from uvc.solver.param_groups import Groups
from uvc.solver.rounding import project_to_budget
from uvc.solver.state import State
from uvc.structure import Structure, apply_structure
from uvc.training.losses import Classification

RESCORES = 10
# A head goes with its last v dim. Whole heads as candidates of their own made this rival weaker by 2 points
# or
# more, as they did UVC, so it does without them, too.
GROUPS = ("qk", "v", "neuron")


class Greedy:
    """First-order importance (gradient of a gate of 1 on a group) per marginal MAC, one greedy over the
    whole model.

    `collect` after a backward pass; `prune` gives the model its structure of at most `ratio` of the dense
    MACs, from what is left of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups, self.prices = Groups(model), prices(model, "macs")
        self.state = State.new(self.groups.geometry, 6.0)
        self.state.hard = True
        self.dense_cost = masks_cost(*self.state.alive(), self.prices)

    def collect(self) -> None:
        """Adds the squared first-order change of this batch's loss."""
        for name, value in self.groups.first_order().items():
            self.state.families[name].importance += value.square()

    def prune(self, ratio: float) -> None:
        """Removes the least important per MAC, and begins a new collection."""
        limit = Limit("macs", self.prices, self.dense_cost, ratio)
        masks = project_to_budget(self.state, [limit], GROUPS)
        self.groups.apply(masks)
        qk, v, neuron, _ = masks
        for name, mask in (("qk", qk), ("v", v), ("neuron", neuron), ("head", v.any(-1))):
            family = self.state.families[name]
            family.dead.copy_(~mask.reshape(family.dead.shape))
            family.importance.zero_()


def global_taylor(context: Context) -> nn.Module:
    """One shot: importance over one epoch of training images, or part of one, at the teacher's weights."""
    model = context.student()
    greedy, loss = Greedy(model), context.loss()
    model.train()
    few = max(round(context.scoring * len(context.batches)), 1)
    for images, labels in itertools.islice(context.batches, few):
        loss(model, images, labels)["loss"].backward()
        greedy.collect()
        model.zero_grad(set_to_none=True)
    greedy.prune(context.budget)
    return model


class Rescored:
    """The greedy as `Trainer` calls a search: prunes RESCORES times, in equal steps from 1 to the budget."""

    def __init__(self, model: nn.Module, budget: float, steps: int) -> None:
        self.greedy, self.budget, self.steps, self.count, self.round = Greedy(model), budget, steps, 0, 0

    def before(self) -> None:
        """Nothing is sampled."""

    def observe(self) -> None:
        """Collects after the backward pass."""
        self.greedy.collect()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Prunes when a tenth of the steps has passed."""
        self.count += 1
        due = self.count * RESCORES // self.steps
        if due > self.round:
            self.round = due
            self.greedy.prune(1.0 + (self.budget - 1.0) * due / RESCORES)

    def metrics(self) -> dict[str, float]:
        """Nothing to log."""
        return {}


def global_taylor_balanced(context: Context) -> nn.Module:
    """The re-scored greedy in UVC's basis of heads, which is no part of it: tells the basis from the
    solver.
    """
    model = context.student()
    balance_heads(model)
    return global_taylor_rescored(context, model)


def global_taylor_rescored(context: Context, model: nn.Module | None = None) -> nn.Module:
    """The same greedy, scored again ten times during a short search ("GT")."""
    model, epochs = model or context.student(), context.config.search_epochs
    torch.manual_seed(context.seed)
    trainer = context.trainer(model)
    search = Rescored(model, context.budget, epochs * len(context.batches))
    optimizer = trainer.optimizer(context.config.search_learning_rate)
    trainer.phase("search", epochs, context.loss(), optimizer, search)
    return model


def random_structure(context: Context) -> nn.Module:
    """The greedy with importance drawn at random."""
    model = context.student()
    greedy, generator = Greedy(model), torch.Generator().manual_seed(context.seed)
    for family in greedy.state.families.values():
        family.importance.copy_(torch.rand(family.importance.shape, generator=generator))
    greedy.prune(context.budget)
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

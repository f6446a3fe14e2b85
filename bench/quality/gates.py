"""Stochastic gates as a rival: every group is kept with a probability, which is learnt with the weights.

Our own small version of what HiAP and its like do, from the general formulas. A hard-concrete gate (Louizos
et al., 2018) stands on every dim and neuron, and one on every head and every MLP around it. With
u ~ U(0, 1) and a logit a,
    x = sigmoid((log u - log(1 - u) + a) / BETA),  z = clip(x (HIGH - LOW) + LOW, 0, 1),
    P(z > 0) = sigmoid(a - BETA log(-LOW / HIGH)).
The loss gets a price on the expected cost above the budget of the moment. Nothing is skipped while gates are
learnt. S segments of G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.quality.rivals import Balanced
from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import Counts, total
from uvc.solver import Groups, method, round_to_budget
from uvc.solver.importance import group_prices
from uvc.solver.state import FAMILIES, Factors

NAME = "stochastic_gates"
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
SHIFT = BETA * math.log(-LOW / HIGH)
# The best of four settings on validation images of digits, seed 100: 92.0 at 0.33, 87.8 at 0.08.
START, RATE, PRICE = 3.0, 0.1, 10.0  # first logit; Adam's rate for logits; weight of the price
ANNEAL = 0.7  # share of the search over which the budget comes down, by equal steps


class Sides(Groups):
    """Of every group the one side that a gate multiplies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.parts = self.gated
        self.parameters = list({id(part.parameter): part.parameter for part in self.parts}.values())

    def shrink_gradients(self, factors: Factors) -> None:
        """Multiplies the gradient of every group by its factor, in place."""
        self._scale(self.parts, [part.parameter.grad for part in self.parts], factors)


@method(NAME)
class StochasticGates(Balanced):
    """Learns gates during the search, in UVC's basis of heads; at its end groups go by their probability per
    cost's order, the least probable first, down to the budget.
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
        self.sides, geo = Sides(model), self.groups.geometry
        shapes = {name: geo.segments(name) for name in FAMILIES}
        shapes |= {"head": (geo.layers * geo.heads, 1), "mlp": (geo.layers, 1)}
        self.logits = {name: torch.full(shape, START, requires_grad=True) for name, shape in shapes.items()}
        self.optimizer = torch.optim.Adam(self.logits.values(), RATE)
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: list[Tensor] = []

    def before(self) -> None:
        """Draws the gates of this step, and multiplies weights by them."""
        self._restore()
        self.gates = self._drawn()
        self.factors = self._spread(self.gates)
        self.weights = [parameter.detach().clone() for parameter in self.sides.parameters]
        self.sides.shrink(self.factors)

    def observe(self, scale: float = 1.0) -> None:
        """A step of the gates; weights and their gradients are again those without gates."""
        self._restore()
        slopes = self.sides.first_order()  # dloss/dgate [S, G]
        self.sides.shrink_gradients(self.factors)
        loss = sum((self.gates[name] * slopes[name] / scale).sum() for name in FAMILIES)
        (loss + PRICE * self._excess()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.count += 1

    @torch.no_grad()
    def harden(self) -> None:
        """Gates at their mode are made part of the weights, and the least probable groups go."""
        modes = {name: _stretched(logit.sigmoid()) for name, logit in self.logits.items()}
        self.sides.shrink(self._spread(self._joined(modes)))
        kept = self._kept()
        around = {"qk": kept["head"], "v": kept["head"], "neuron": kept["mlp"]}
        prices = group_prices(self.state, self.limits[0].costs.at(self._counts(kept)))
        for name, family in self.state.families.items():
            family.importance.copy_(kept[name] * around[name].view(-1, 1) * prices[name])
        masks = round_to_budget(self.state, self.limits)
        self.groups.apply(masks)

    def metrics(self) -> dict[str, float]:
        with torch.no_grad():
            return {"expected_cost": float(self._cost()), "target": self._target()}

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self.sides.parameters, self.weights, strict=False):
                parameter.copy_(weight)
        self.weights = []

    def _drawn(self) -> dict[str, Tensor]:
        """A gate for every group [S, G], that of its head or MLP with it."""
        drawn = {}
        for name, logit in self.logits.items():
            u = torch.rand(logit.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
            drawn[name] = _stretched(((u.logit() + logit) / BETA).sigmoid())
        return self._joined(drawn)

    def _joined(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gate of a head is on its v dims: without them it adds nothing."""
        return {"qk": gates["qk"], "v": gates["v"] * gates["head"], "neuron": gates["neuron"] * gates["mlp"]}

    def _spread(self, gates: dict[str, Tensor]) -> Factors:
        return Factors(*(self.groups.geometry.spread(name, gates[name].detach()) for name in FAMILIES))

    def _kept(self) -> dict[str, Tensor]:
        """Probabilities of being kept."""
        return {name: (logit - SHIFT).sigmoid() for name, logit in self.logits.items()}

    def _counts(self, kept: dict[str, Tensor]) -> Counts:
        """Expected counts, tensors [L]."""
        layers = self.groups.geometry.layers
        qk, v = ((kept["head"] * kept[name]).view(layers, -1).sum(1) for name in ("qk", "v"))
        neurons, running = (kept["mlp"] * kept["neuron"]).sum(1), torch.ones(layers)
        return Counts(running, kept["mlp"][:, 0], qk, v, neurons, kept["head"].view(layers, -1).sum(1))

    def _cost(self) -> Tensor:
        """The expected cost over the dense one's."""
        return total(self.limits[0].costs, self._counts(self._kept())) / self.limits[0].dense

    def _target(self) -> float:
        budget = self.limits[0].budget
        return 1.0 + (budget - 1.0) * min(self.count / (ANNEAL * self.steps), 1.0)

    def _excess(self) -> Tensor:
        """What the expected cost is above the budget of the moment, relative to it."""
        return (self._cost() / self._target() - 1.0).clamp_min(0.0)


def _stretched(x: Tensor) -> Tensor:
    return (x * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

"""The solver's variables. S segments of G groups per family; all tensors are small and live on the model's
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Sizes of the dense model: L layers, H heads, K head dim, F neurons."""

    layers: int
    heads: int
    head_dim: int
    hidden: int

    def segments(self, family: str) -> tuple[int, int]:
        """(S, G) of a family."""
        per_head = (self.layers * self.heads, self.head_dim)
        return {
            "head": (self.layers, self.heads),
            "qk": per_head,
            "v": per_head,
            "neuron": (self.layers, self.hidden),
        }[family]


FAMILIES = ("head", "qk", "v", "neuron")


@dataclass
class Family:
    """One kind of group.

    importance [S, G]: moving average of the squared first-order change of the loss when the group is removed.
    s [S]: removed fraction (the paper's s, or r for dims). y [S]: multiplier (the paper's y, or p). dead [S,
    G]: at exact zero.
    scale: mean squared norm of a group at the start, over all layers. grain: groups go in multiples of this.
    """

    importance: Tensor
    s: Tensor
    y: Tensor
    dead: Tensor
    scale: float = 1.0
    grain: int = 1

    @classmethod
    def new(cls, segments: int, groups: int, device: torch.device, grain: int = 1) -> Family:
        zeros = torch.zeros(segments, device=device)
        return cls(
            importance=torch.zeros(segments, groups, device=device),
            s=zeros.clone(),
            y=zeros + 1.0,
            dead=torch.zeros(segments, groups, dtype=torch.bool, device=device),
            grain=grain,
        )

    def removed(self) -> Tensor:
        """bool [S, G]: the round(s * G) least important groups of every segment, dead ones among them, or as
        many whole grains.

        Halves round down, by more than the last bit of s, which differs between machines.
        """
        count = (self.s * self.dead.shape[1] - 1e-4).round().div(self.grain, rounding_mode="floor")
        count = count * self.grain
        return smallest(self.importance.masked_fill(self.dead, -1.0), count)


def smallest(importance: Tensor, count: Tensor) -> Tensor:
    """bool [S, G]: the ``count[s]`` smallest entries of every row. The one top-k walk behind prox, cost and
    skipping.
    """
    return ranks(importance) < count[:, None]


def ranks(importance: Tensor) -> Tensor:
    """int64 [S, G]: position of every entry in its row, ascending, ties by index."""
    order = importance.argsort(dim=1, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


@dataclass
class TokenState:
    """Which patch tokens go: S sites of G buckets of tokens, the worst ranked first (see ``tokens``).

    importance [S, G]: as of a ``Family``. s [S]: removed fraction. price [S]: what a bucket costs, in the
    unit of the first limit. shares: for every limit, what all buckets cost at that price, as a fraction of
    the dense cost. gone: buckets that the model drops at each site.
    """

    importance: Tensor
    s: Tensor
    price: Tensor
    shares: list[float]
    gone: list[int]

    @classmethod
    def new(cls, sites: int, buckets: int, device: torch.device | str = "cpu") -> TokenState:
        zeros = torch.zeros(sites, buckets, device=device)
        return cls(zeros, zeros[:, 0].clone(), zeros[:, 0] + 1.0, [0.0], [0] * sites)

    def ratio(self) -> Tensor:
        """[S, G]: importance per cost, of a better bucket and of an earlier site at least that of the others.

        As tokens go by their rank, and for good, this is the order in which they can go.
        """
        ratio = (self.importance / self.price[:, None]).cummax(1).values
        return ratio.flip(0).cummax(0).values.flip(0)

    def approach(self, best: Tensor, rate: float) -> None:
        """s <- s + rate * (best - s), never more at a site than at the next; the best bucket stays."""
        s = self.s + rate * (best - self.s)
        self.s.copy_(s.clamp_max(1.0 - 1.0 / self.importance.shape[1]).flip(0).cummin(0).values.flip(0))

    def wanted(self) -> list[int]:
        """Buckets that s removes at each site, halves down."""
        return (self.s * self.importance.shape[1] - 1e-4).round().int().tolist()


@dataclass
class State:
    """All variables of the solver.

    theta [L, 2]: gate logits. z [M]: multiplier of each of M limits. hard: gates are frozen to 0 or 1.
    settled: the budget is reached, nothing is removed any more.
    """

    geometry: Geometry
    families: dict[str, Family]
    theta: Tensor
    gate_usefulness: Tensor
    z: Tensor
    hard: bool = False
    settled: bool = False
    tokens: TokenState | None = None

    @classmethod
    def new(
        cls,
        geometry: Geometry,
        gate_init: float,
        device: torch.device | str = "cpu",
        limits: int = 1,
        grain: tuple[int, int] = (1, 1),
    ) -> State:
        device = torch.device(device)
        theta = torch.full((geometry.layers, 2), float(gate_init), device=device)
        grains = {"head": 1, "qk": grain[0], "v": grain[0], "neuron": grain[1]}
        families = {n: Family.new(*geometry.segments(n), device, grains[n]) for n in FAMILIES}
        return cls(geometry, families, theta, torch.zeros_like(theta), torch.zeros(limits, device=device))

    def gates(self) -> Tensor:
        """[L, 2]: probability that a half runs; exactly 0 or 1 once hard."""
        return (self.theta > 0).to(self.theta.dtype) if self.hard else torch.sigmoid(self.theta)

    def alive(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masks of what is not at exact zero: q/k dims and v dims [L, H, K], neurons [L, F], running halves
        [L, 2].
        """
        g = self.geometry
        shape = (g.layers, g.heads, g.head_dim)
        v = ~self.families["v"].dead.view(shape)
        qk = ~self.families["qk"].dead.view(shape) & v.any(-1, keepdim=True)
        running = self.theta > 0 if self.hard else torch.ones_like(self.theta, dtype=torch.bool)
        return qk, v, ~self.families["neuron"].dead, running

    def tensors(self) -> dict[str, Tensor]:
        """Flat name -> tensor, for checkpoints."""
        flat = {"theta": self.theta, "gate_usefulness": self.gate_usefulness, "z": self.z}
        flat |= {"hard": torch.tensor(self.hard), "settled": torch.tensor(self.settled)}
        for name, family in self.families.items():
            for key in ("importance", "s", "y", "dead"):
                flat[f"{name}.{key}"] = getattr(family, key)
            flat[f"{name}.scale"] = torch.tensor(family.scale, dtype=torch.float64)
        if self.tokens is not None:
            flat |= {"token.importance": self.tokens.importance, "token.s": self.tokens.s}
            flat["token.gone"] = torch.tensor(self.tokens.gone)
        return flat

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``; KeyError or RuntimeError when names or shapes differ."""
        self.theta.copy_(flat["theta"])
        self.gate_usefulness.copy_(flat["gate_usefulness"])
        self.z.copy_(flat["z"])
        self.hard, self.settled = bool(flat["hard"]), bool(flat["settled"])
        for name, family in self.families.items():
            for key in ("importance", "s", "y", "dead"):
                getattr(family, key).copy_(flat[f"{name}.{key}"])
            family.scale = float(flat[f"{name}.scale"])
        if self.tokens is not None:
            self.tokens.importance.copy_(flat["token.importance"])
            self.tokens.s.copy_(flat["token.s"])
            self.tokens.gone = flat["token.gone"].tolist()


class Factors(NamedTuple):
    """What the prox multiplies weights with: q/k dims and v dims [L, H, K], neurons [L, F]."""

    qk: Tensor
    v: Tensor
    neuron: Tensor


# q/k dims and v dims [L, H, K], neurons [L, F], running halves [L, 2]
Masks = tuple[Tensor, Tensor, Tensor, Tensor]

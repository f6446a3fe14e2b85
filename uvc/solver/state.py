"""The solver's variables. S segments of G groups per family; all tensors are small and live on the model's
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Sizes of the dense model: L layers, H heads, K head dim, F neurons.

    sizes: (heads, head dim, neurons) of each layer where they differ. H, K and F are then the largest, and
    what a smaller layer has not is gone from the beginning. pairs: "" where each q/k dim is a group of its
    own; where two are one group, "neighbours" (2 i, 2 i + 1) or "halves" (i, i + K/2).
    """

    layers: int
    heads: int
    head_dim: int
    hidden: int
    pairs: str = ""
    sizes: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int, int]], pairs: str = "") -> Geometry:
        """That of layers of these sizes."""
        largest = map(max, *sizes) if len(sizes) > 1 else sizes[0]
        return cls(len(sizes), *largest, pairs, tuple(sizes) if len(set(sizes)) > 1 else ())

    def own(self, family: str, layer: int, row: Tensor) -> Tensor:
        """Of a row of one entry per dim or neuron, [H, K] or [F], what the layer has: a view."""
        if not self.sizes:
            return row
        heads, head_dim, hidden = self.sizes[layer]
        return row[:hidden] if family == "neuron" else row[:heads, :head_dim]

    def size(self, family: str, layer: int) -> int:
        """How many dims, or neurons, a layer has."""
        heads, head_dim, hidden = (
            self.sizes[layer] if self.sizes else (self.heads, self.head_dim, self.hidden)
        )
        return hidden if family == "neuron" else heads * head_dim

    def stacked(self, family: str, rows: Sequence[Tensor]) -> Tensor:
        """Rows of what each layer has, in one dimension or two -> `shape`, zero elsewhere."""
        if not self.sizes:
            return torch.stack(list(rows)).view(self.shape(family))
        whole = rows[0].new_zeros(self.shape(family))
        for layer, row in enumerate(rows):
            own = self.own(family, layer, whole[layer])
            own.copy_(row.view(own.shape))
        return whole

    def there(self, family: str) -> Tensor:
        """bool [S, G]: groups that a layer has."""
        rows = [
            self.own(family, layer, torch.ones(self.shape(family)[1:], device="cpu"))
            for layer in range(self.layers)
        ]
        return self.gathered(family, self.stacked(family, rows)) > 0

    def unit(self, family: str) -> int:
        """How many dims, or neurons, a group is."""
        return 2 if family == "qk" and self.pairs else 1

    def segments(self, family: str) -> tuple[int, int]:
        """(S, G) of a family: the groups of dims of each head, the neurons of each layer."""
        neurons = (self.layers, self.hidden)
        dims = (self.layers * self.heads, self.head_dim // self.unit(family))
        return neurons if family == "neuron" else dims

    def shape(self, family: str) -> tuple[int, ...]:
        """Of one entry per dim or neuron: [L, H, K] or [L, F]."""
        dims = (self.layers, self.heads, self.head_dim)
        return (self.layers, self.hidden) if family == "neuron" else dims

    def spread(self, family: str, groups: Tensor) -> Tensor:
        """One entry per group [S, G] -> one per dim or neuron, `shape`."""
        if self.unit(family) == 2:
            neighbours = self.pairs == "neighbours"
            groups = groups.repeat_interleave(2, -1) if neighbours else torch.cat([groups, groups], -1)
        return groups.reshape(self.shape(family))

    def gathered(self, family: str, each: Tensor) -> Tensor:
        """One entry per dim or neuron, `shape` -> the sums over groups [S, G]."""
        S, G = self.segments(family)
        if self.unit(family) == 1:
            return each.reshape(S, G)
        return each.reshape(S, G, 2).sum(-1) if self.pairs == "neighbours" else each.reshape(S, 2, G).sum(1)


FAMILIES = ("qk", "v", "neuron")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where it comes from the CPU nothing waits for the copy."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


ALWAYS = 100.0  # logit of a probability that is 1 in floating point
NAMES = {"qk": "q/k dims", "v": "v dims", "neuron": "neurons"}


@dataclass
class Family:
    """One kind of group.

    importance [S, G]: moving average of the squared first-order change of the loss when the group is removed.
    s [S]: removed fraction (the paper's s, or r for dims). y [S]: multiplier (the paper's y, or p). dead [S,
    G]: at exact zero, for good. gone [S, G]: left out before the search, which never puts it back. absent [S,
    G]: there is no such group; it is dead and gone, and counts nowhere. open [S]: whether groups may be
    removed: none of their parameters is frozen, and gradients have reached them. fixed [S]: whether the layer
    does not offer to remove them. some [S]: whether a multiple of them must stay. scale: mean squared norm of
    a group at the start, over all layers. multiple: of which groups are kept.
    """

    importance: Tensor
    s: Tensor
    y: Tensor
    dead: Tensor
    open: Tensor
    fixed: Tensor
    some: Tensor
    gone: Tensor
    absent: Tensor
    scale: float = 1.0
    multiple: int = 1

    @classmethod
    def new(cls, segments: int, groups: int, device: torch.device, multiple: int = 1) -> Family:
        zeros = torch.zeros(segments, device=device)
        return cls(
            importance=torch.zeros(segments, groups, device=device),
            s=zeros.clone(),
            y=zeros + 1.0,
            dead=torch.zeros(segments, groups, dtype=torch.bool, device=device),
            open=torch.ones(segments, dtype=torch.bool, device=device),
            fixed=torch.zeros(segments, dtype=torch.bool, device=device),
            some=torch.zeros(segments, dtype=torch.bool, device=device),
            gone=torch.zeros(segments, groups, dtype=torch.bool, device=device),
            absent=torch.zeros(segments, groups, dtype=torch.bool, device=device),
            multiple=multiple,
        )

    def on(self, device: torch.device) -> Family:
        """The same where the weights are, its tensors sent as one; on the CPU they are these."""
        if device.type == "cpu":
            return self
        names = ("importance", "s", "y", "dead", "some", "absent")
        tensors = [getattr(self, name) for name in names]
        flat = sent(torch.cat([t.to(self.s.dtype).flatten() for t in tensors]), device)
        parts = flat.split([t.numel() for t in tensors])
        there = {n: p.view(t.shape).to(t.dtype) for n, p, t in zip(names, parts, tensors, strict=True)}
        return replace(self, **there)

    def lack(self, absent: Tensor) -> None:
        """There are no such groups, bool [S, G]."""
        for mask in (self.absent, self.dead, self.gone):
            mask |= absent
        self.s.copy_(absent.to(self.s.dtype).mean(1))

    def own(self) -> Tensor:
        """[S]: the share of groups that are there; 1 / G where none is."""
        return (1.0 - self.absent.to(self.s.dtype).mean(1)).clamp_min(1.0 / self.absent.shape[1])

    def mean(self, each: Tensor) -> float:
        """The mean of [S, G] over the groups that are there."""
        return float(each[~self.absent].mean() if self.absent.any() else each.mean())

    def removed_share(self) -> float:
        """The mean of s, over segments that are there, as a share of their groups."""
        s, there = 1.0 - (1.0 - self.s) / self.own(), ~self.absent.all(1)
        return float(s[there].mean() if self.absent.any() else self.s.mean())

    def removed(self) -> Tensor:
        """bool [S, G]: the round(s * G) least important groups of every segment, dead ones among them; of
        multiples, rounded down.

        Halves round down, by more than the last bit of s, which differs between machines.
        """
        count = (self.s * self.dead.shape[1] - 1e-4).round().div(self.multiple, rounding_mode="floor")
        most = self.dead.shape[1] // self.multiple - self.some.to(count.dtype)
        # A skipped half has nothing left, whatever must stay of it otherwise.
        count = torch.where(self.dead.all(1), count, torch.minimum(count, most))
        importance = self.importance.masked_fill(self.dead, -1.0).masked_fill(self.absent, -2.0)
        return smallest(importance, count * self.multiple)

    def free(self) -> Tensor:
        """bool [S]: segments that may lose groups."""
        return self.open & ~self.fixed

    def held(self) -> Tensor:
        """bool [S, G]: what stays as it is: groups of segments that are not free, but for dead ones."""
        return ~(self.free()[:, None] | self.dead)


def smallest(importance: Tensor, count: Tensor) -> Tensor:
    """bool [S, G]: the ``count[s]`` smallest entries of every row, ties by index. The one top-k walk behind
    prox, cost and skipping.
    """
    order = importance.argsort(dim=1, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places) < count[:, None]


@dataclass
class TokenState:
    """Which patch tokens are dropped: S sites of G buckets of tokens, the worst ranked first (see
    ``token_groups``). Without a site no token is.

    importance [S, G]: as of a ``Family``. s [S]: removed fraction. price [S]: what a bucket costs, in the
    unit of the first limit. shares: for every limit, what all buckets cost at that price, as a fraction of
    the dense cost. dropped: buckets that the model drops at each site.
    """

    importance: Tensor
    s: Tensor
    price: Tensor
    shares: list[float]
    dropped: list[int]

    @classmethod
    def new(cls, sites: int, buckets: int, device: torch.device | str = "cpu", limits: int = 1) -> TokenState:
        zeros = torch.zeros(sites, buckets, device=device)
        row = torch.zeros(sites, device=device)
        return cls(zeros, row, row + 1.0, [0.0] * limits, [0] * sites)

    def ratio(self) -> Tensor:
        """[S, G]: importance per cost, of a better bucket and of an earlier site at least that of the others.

        As tokens are dropped by their rank, and for good, this is the order in which they can be.
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


class Factors(NamedTuple):
    """One entry per group, for all weights of it: q/k dims and v dims [L, H, K], neurons [L, F]."""

    qk: Tensor
    v: Tensor
    neuron: Tensor


class Masks(NamedTuple):
    """What is kept: q/k and v dims [L, H, K], neurons [L, F], halves that run [L, 2] (attention, MLP)."""

    qk: Tensor
    v: Tensor
    neuron: Tensor
    running: Tensor


@dataclass
class State:
    """All variables of the solver.

    theta [L, 2]: gate logits; ALWAYS where a half is frozen. z [M]: multiplier of each of M
    limits. hard: gates are frozen to 0 or 1. settled: the budget is reached, nothing is removed any more.
    """

    geometry: Geometry
    families: dict[str, Family]
    theta: Tensor
    gate_usefulness: Tensor
    z: Tensor
    tokens: TokenState
    hard: bool = False
    settled: bool = False

    @classmethod
    def new(
        cls,
        geometry: Geometry,
        gate_init: float = 6.0,
        device: torch.device | str = "cpu",
        limits: int = 1,
        multiples: Sequence[int] = (1, 1),
        whole_heads: bool = False,
    ) -> State:
        device = torch.device(device)
        theta = torch.full((geometry.layers, 2), float(gate_init), device=device)
        dims, neurons = multiples
        v = geometry.head_dim if whole_heads else dims
        families = {
            # A multiple of dims is as many groups as hold one.
            name: Family.new(*geometry.segments(name), device, -(-multiple // geometry.unit(name)))
            for name, multiple in zip(FAMILIES, (dims, v, neurons), strict=True)
        }
        for name, family in families.items() if geometry.sizes else ():
            family.lack(~geometry.there(name).to(device))
        z, tokens = torch.zeros(limits, device=device), TokenState.new(0, 1, device, limits)
        return cls(geometry, families, theta, torch.zeros_like(theta), z, tokens)

    def gates(self) -> Tensor:
        """[L, 2]: probability that a half runs; exactly 0 or 1 once hard."""
        return (self.theta > 0).to(self.theta.dtype) if self.hard else torch.sigmoid(self.theta)

    def heads(self) -> Tensor:
        """bool [L, H]: heads with a v dim left; one without adds nothing to the output."""
        return ~self.families["v"].dead.all(1).view(self.geometry.layers, self.geometry.heads)

    def held(self) -> Tensor:
        """bool [L, 2]: halves that stay, as some of their groups are not open."""
        families = (self.families[name] for name in ("v", "neuron"))
        held = [~(f.open[:, None] | f.dead).view(self.geometry.layers, -1) for f in families]
        return torch.stack([mask.any(1) for mask in held], 1)

    def alive(self) -> Masks:
        """What is not at exact zero."""
        return self._masks({name: ~family.dead for name, family in self.families.items()}, self.running())

    def least(self) -> Masks:
        """What is left when all that may be removed is."""
        return self._masks({name: family.held() for name, family in self.families.items()}, self.held())

    def running(self) -> Tensor:
        """bool [L, 2]: halves that no hard gate skips."""
        return self.theta > 0 if self.hard else torch.ones_like(self.theta, dtype=torch.bool)

    def _masks(self, kept: dict[str, Tensor], running: Tensor) -> Masks:
        qk, v = (self.geometry.spread(name, kept[name]) for name in ("qk", "v"))
        return Masks(qk & v.any(-1, keepdim=True), v, kept["neuron"], running)

    def keep(self, masks: Masks) -> None:
        """Marks every group dead that ``masks`` leaves out."""
        for name, family in self.families.items():
            family.dead.copy_(self.geometry.gathered(name, getattr(masks, name).int()) == 0)

    def check_finite(self) -> None:
        """RuntimeError that names the first block whose groups have an importance that is not finite."""
        layers, families = self.geometry.layers, self.families.values()
        bad = torch.stack([~family.importance.isfinite().view(layers, -1).all(1) for family in families], 1)
        if bad.any():
            layer, family = bad.nonzero()[0].tolist()
            raise RuntimeError(
                f"block {layer}: the importance of its {NAMES[FAMILIES[family]]} is not finite, as its "
                "gradients were not; lower the learning rate or look for such values in the data"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Flat name -> tensor, for checkpoints."""
        flat = {"theta": self.theta, "gate_usefulness": self.gate_usefulness, "z": self.z}
        flat |= {"hard": torch.tensor(self.hard), "settled": torch.tensor(self.settled)}
        for name, family in self.families.items():
            for key in ("importance", "s", "y", "dead", "open"):
                flat[f"{name}.{key}"] = getattr(family, key)
            flat[f"{name}.scale"] = torch.tensor(family.scale, dtype=torch.float64)
        if self.tokens.dropped:
            flat |= {"token.importance": self.tokens.importance, "token.s": self.tokens.s}
            flat["token.dropped"] = torch.tensor(self.tokens.dropped)
        return flat

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``; KeyError or RuntimeError when names or shapes differ."""
        self.theta.copy_(flat["theta"])
        self.gate_usefulness.copy_(flat["gate_usefulness"])
        self.z.copy_(flat["z"])
        self.hard, self.settled = bool(flat["hard"]), bool(flat["settled"])
        for name, family in self.families.items():
            for key in ("importance", "s", "y", "dead", "open"):
                getattr(family, key).copy_(flat[f"{name}.{key}"])
            family.scale = float(flat[f"{name}.scale"])
        if self.tokens.dropped:
            self.tokens.importance.copy_(flat["token.importance"])
            self.tokens.s.copy_(flat["token.s"])
            self.tokens.dropped = flat["token.dropped"].tolist()

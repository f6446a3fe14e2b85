"""What a structure may cost: budgets in one metric or several, what they can reach, multiples."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from uvc.config import METRICS, named_budgets
from uvc.costs import LINEAR, Costs, Counts, counts, prices, total
from uvc.layers import sizes_of
from uvc.structure import Structure


class Limit(NamedTuple):
    """One budget: a fraction of what the dense model costs in one metric."""

    metric: str
    costs: Costs
    dense: float
    budget: float

    @property
    def most(self) -> float:
        """What may be spent; a whole number where costs are."""
        return int(self.budget * self.dense) if isinstance(self.dense, int) else self.budget * self.dense

    @property
    def smallest(self) -> float:
        """The smallest budget that can be met: every block skipped."""
        return self.costs.fixed / self.dense


def limits(
    model: nn.Module,
    budget: float | Mapping[str, float],
    metric: str = "macs",
    latency: Costs | None = None,
) -> tuple[Limit, ...]:
    """The limits that `budget` sets: a fraction in `metric`, or a fraction for each metric that it names.

    `latency` is the table behind the metric "latency". ValueError for a fraction outside (0, 1], an unknown
    metric, a latency without its table, or a budget below the smallest that can be met.
    """
    dense, found = Structure.dense(model), []
    for name, fraction in named_budgets(budget, metric).items():
        if name == "latency" and latency is None:
            raise ValueError(
                "budget: one in latency needs a table; make one with uvc.latency_table.measure(model)"
            )
        # A fraction of the cost with all tokens; what the blocks keep is priced at the model's own tokens.
        costs, whole = (
            (latency,) * 2 if name == "latency" else (prices(model, name, at) for at in (None, dense))
        )
        limit = Limit(name, costs, total(whole, counts(dense)), fraction)
        if fraction < limit.smallest:
            raise ValueError(
                f"budget: {fraction} is below {limit.smallest:.4f}, the smallest reachable {name} budget of "
                "this model; ask for more"
            )
        found.append(limit)
    return tuple(found)


class Reach(NamedTuple):
    """How far a metric can go: the dense cost, and fractions of it.

    `skipped`: with every block skipped, the smallest budget that can be met. `thin`: with all halves running,
    on one head of one q/k dim and one v dim, and on one neuron (or on one multiple of them), as far as the
    layers offer to remove the rest.
    """

    metric: str
    dense: float
    skipped: float
    thin: float

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.skipped:.4f} of the dense cost with every block skipped, {self.thin:.4f} "
            "with the least in every block"
        )


def reachable(
    model: nn.Module, latency: Costs | None = None, round_to: tuple[int, int] = (1, 1)
) -> tuple[Reach, ...]:
    """What budgets a timm or converted model can meet, in every metric (latency only with its table)."""
    dense_structure, found = Structure.dense(model), []
    whole = counts(dense_structure)
    s, (dims, neurons), rows = sizes_of(model), round_to, []
    for offered, size in zip(s.families, s.each, strict=True):
        heads = 1 if offered.heads else size.heads
        qk, v = (heads * (dims if unit else size.head_dim) for unit in (offered.qk, offered.v))
        rows.append((1, 1, qk, v, neurons if offered.neurons else size.neurons, heads))
    least = Counts(*zip(*rows, strict=True))
    for metric in METRICS if latency is not None else LINEAR:
        costs = latency if metric == "latency" else prices(model, metric, dense_structure)
        dense = total(costs, whole)
        found.append(Reach(metric, dense, costs.fixed / dense, total(costs, least) / dense))
    return tuple(found)


def check_multiples(model: nn.Module, round_to: tuple[int, int]) -> None:
    """ValueError unless the dims of a head and the neurons of a timm or converted ``model`` are multiples."""
    sizes = sizes_of(model)
    for name, of, part in (("head dim", "head_dim", round_to[0]), ("neurons", "neurons", round_to[1])):
        wholes = sorted({getattr(size, of) for size in sizes.each})
        whole = next((n for n in wholes if not isinstance(part, int) or part < 1 or n % part), None)
        if whole is not None:
            raise ValueError(
                f"round_to: {part} does not divide the {name} of this model, {whole}; 1 always does"
            )
    if round_to[0] > 1 and round_to[0] % 2 and any(offered.qk == 2 for offered in sizes.families):
        raise ValueError(
            f"round_to: {round_to[0]} dims are no whole pairs, as q/k dims here go; use an even number"
        )

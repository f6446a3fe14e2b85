"""What the solver weighs: the cost R(s, r, g) of a structure, and what one more unit costs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from uvc.constraints import Limit
from uvc.costs import Costs, Counts, Prices, total
from uvc.solver.state import FAMILIES, Masks, State


def soft_counts(state: State) -> Counts:
    """What s, r and g keep, tensors [L]: fractions as they are, gates by their probability, dims of heads
    that have a v dim left.
    """
    geo, (attn, mlp) = state.geometry, state.gates().unbind(1)
    left = {name: 1.0 - state.families[name].s for name in FAMILIES}
    heads = state.heads().to(state.theta.dtype)
    qk, v = ((heads * left[name].view(geo.layers, geo.heads)).sum(1) * geo.head_dim for name in ("qk", "v"))
    return Counts(attn, mlp, qk, v, left["neuron"] * geo.hidden, heads.sum(1))


def soft_cost(state: State, costs: Costs) -> Tensor:
    """R(s, r, g) in the unit of ``costs``."""
    return total(costs, soft_counts(state))


def hard_cost(state: State, costs: Costs) -> float:
    """Cost of what is alive: dead groups and skips of hard gates cost nothing, everything else in full."""
    return masks_cost(state.alive(), costs)


def masks_cost(masks: Masks, costs: Costs) -> float:
    """Cost of what ``masks`` keep. A head without v dims costs nothing."""
    return total(costs, masks_counts(masks))


def masks_counts(masks: Masks) -> Counts:
    """What ``masks`` keep, L ints each."""
    qk, v, neuron, running = masks
    heads = v.any(-1)
    kept = (*running.unbind(1), (qk & heads[..., None]).sum((1, 2)), v.sum((1, 2)), neuron.sum(1))
    return Counts(*(tuple(n.int().tolist()) for n in (*kept, heads.sum(1))))


def used(masks: Masks, limits: Sequence[Limit]) -> float:
    """Cost of ``masks`` over what may be spent, for the limit furthest from being met; at most 1 when all
    are met.
    """
    counts = masks_counts(masks)
    return max(total(limit.costs, counts) / limit.most for limit in limits)


def weights(z: Sequence[float]) -> list[float]:
    """Shares of the limits in the price of a unit, from their multipliers; equal ones while all are zero."""
    whole = sum(z)
    return [part / whole if whole else 1.0 / len(z) for part in z]


def marginal(state: State, limits: Sequence[Limit]) -> Prices:
    """What a unit costs where the state is: the sum over limits of z_m price_m / dense_m, over the sum of z,
    in the unit of the first limit.
    """
    soft, shares = soft_counts(state), weights(state.z.tolist())
    scales = [share * limits[0].dense / limit.dense for limit, share in zip(limits, shares, strict=True)]
    prices = [limit.costs.at(soft) for limit in limits]

    def mean(values: Sequence[float]) -> float:
        return sum(value * scale for value, scale in zip(values, scales, strict=True))

    fixed = mean([price.fixed for price in prices])
    columns = zip(*(price[1:] for price in prices), strict=True)
    return Prices(fixed, *(tuple(map(mean, zip(*parts, strict=True))) for parts in columns))

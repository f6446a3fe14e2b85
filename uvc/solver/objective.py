"""What the solver weighs: the score q of every group on one scale, and the cost R(s, r, g) of a structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from uvc.constraints import Limit
from uvc.costs import Costs, Counts, Prices, total
from uvc.solver.state import State, ranks


def survival(state: State) -> Tensor:
    """[L, H] in [0, 1]: how much of each head is left when s * H of them, the least important first, are
    removed.
    """
    heads = state.families["head"]
    rank = ranks(heads.importance.masked_fill(heads.dead, -1.0))
    return (rank + 1 - heads.s[:, None] * state.geometry.heads).clamp(0.0, 1.0)


def soft_counts(state: State) -> Counts:
    """What s, r and g keep, tensors [L]: fractions as they are, gates by their probability, dims of surviving
    heads only.
    """
    geo = state.geometry
    left = {name: 1.0 - state.families[name].s for name in ("qk", "v", "neuron")}
    survive = survival(state)
    attn, mlp = state.gates().unbind(1)
    n_qk = (survive * left["qk"].view(geo.layers, geo.heads)).sum(1) * geo.head_dim
    n_v = (survive * left["v"].view(geo.layers, geo.heads)).sum(1) * geo.head_dim
    return Counts(attn, mlp, n_qk, n_v, left["neuron"] * geo.hidden, survive.sum(1))


def soft_cost(state: State, costs: Costs) -> Tensor:
    """R(s, r, g) in the unit of ``costs``."""
    return total(costs, soft_counts(state))


def hard_cost(state: State, costs: Costs) -> float:
    """Cost of what is alive: dead groups and frozen skips are gone, everything else counts in full."""
    return masks_cost(*state.alive(), costs)


def masks_cost(qk: Tensor, v: Tensor, neurons: Tensor, running: Tensor, costs: Costs) -> float:
    """Cost of bool masks: q/k and v dims [L, H, K], neurons [L, F], running halves [L, 2]. A head without v
    dims costs nothing.
    """
    return total(costs, masks_counts(qk, v, neurons, running))


def masks_counts(qk: Tensor, v: Tensor, neurons: Tensor, running: Tensor) -> Counts:
    """What bool masks keep, L ints each."""
    heads = v.any(-1)
    kept = (*running.unbind(1), (qk & heads[..., None]).sum((1, 2)), v.sum((1, 2)), neurons.sum(1))
    return Counts(*(tuple(n.int().tolist()) for n in (*kept, heads.sum(1))))


def used(state: State, limits: Sequence[Limit]) -> float:
    """What is alive over what may be spent, for the limit that is furthest from being met; at most 1 when all
    are met.
    """
    counts = masks_counts(*state.alive())
    return max(total(limit.costs, counts) / limit.most for limit in limits)


def weights(z: Sequence[float]) -> list[float]:
    """Shares of the limits in the price of a unit, from their multipliers; equal ones while all are zero."""
    whole = sum(z)
    return [part / whole if whole else 1.0 / len(z) for part in z]


def marginal(state: State, limits: Sequence[Limit]) -> Prices:
    """What a unit costs where the state is: the sum over limits of z_m price_m / dense_m, over the sum of z,
    in the unit of the first limit.
    """
    soft = soft_counts(state)
    scaled = [
        (limit.costs.at(soft), share * limits[0].dense / limit.dense)
        for limit, share in zip(limits, weights(state.z.tolist()), strict=True)
    ]
    fixed = sum(prices.fixed * scale for prices, scale in scaled)
    columns = zip(*(prices[1:] for prices, _ in scaled), strict=True)
    scales = [scale for _, scale in scaled]
    return Prices(
        fixed,
        *(
            tuple(
                sum(p * s for p, s in zip(block, scales, strict=True)) for block in zip(*parts, strict=True)
            )
            for parts in columns
        ),
    )

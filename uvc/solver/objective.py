"""What the solver weighs: the score q of every group on one scale, and the cost R(s, r, g) of a structure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uvc.budget import Costs, Counts, Limit, Prices, total
from uvc.solver.state import State, ranks


def group_prices(state: State, prices: Prices) -> dict[str, Tensor]:
    """[S, 1] per family: what a q/k dim, a v dim and a neuron of each segment costs."""
    row = {name: state.theta.new_tensor(getattr(prices, name))[:, None] for name in ("qk", "v", "neuron")}
    return {n: p if n == "neuron" else p.repeat_interleave(state.geometry.heads, 0) for n, p in row.items()}


def head_ratio(state: State, prices: Prices) -> Tensor:
    """[L, H]: importance per cost of a head, both of the dims that it keeps.

    A head is worth at least what its dims are worth one by one. Its own first-order change, where they
    cancel, makes whole heads look free: they went first, and took the best dims along (76 instead of 93% on
    small digits at a tenth of the cost).
    """
    worth = cost = torch.zeros_like(state.families["head"].importance)
    price = group_prices(state, prices)
    for name in ("qk", "v"):
        family = state.families[name]
        kept = ~family.removed()
        worth = worth + (family.importance * kept).sum(1).view_as(worth)
        cost = cost + (price[name] * kept).sum(1).view_as(worth)
    # Units of the same ratio do not count as lower, whatever the order of the sum left in its last bits.
    least = torch.minimum(price["qk"], price["v"]).view_as(cost)  # of a head without dims
    return (1.0 - 1e-6) * torch.maximum(worth, state.families["head"].importance) / cost.maximum(least)


def quantiles(state: State, prices: Prices) -> dict[str, Tensor]:
    """q of every family, [S, G] in [0, 1]: the share of the prunable cost with lower importance per cost.

    One scale for all layers and families, and free of the loss's unit: at the optimum a group is removed
    where q < z, and z is then close to the removed share of the cost. Dead groups rank lowest. A head is
    weighed by the dims that it keeps. With tokens, their buckets are on the scale too ("token").
    """
    units = group_prices(state, prices)
    ratios = {
        name: (state.families[name].importance / price).masked_fill(state.families[name].dead, -1.0)
        for name, price in units.items()
    }
    if state.tokens is not None:
        ratios["token"], units["token"] = state.tokens.ratio(), state.tokens.price[:, None]
    ratio = torch.cat([part.flatten() for part in ratios.values()])
    weight = torch.cat([price.expand_as(ratios[name]).flatten() for name, price in units.items()])
    order = ratio.argsort(stable=True)
    below = weight[order].cumsum(0)
    score = torch.empty_like(ratio).scatter_(0, order, (below - weight[order]) / below[-1])
    parts = score.split([part.numel() for part in ratios.values()])
    q = {name: part.view_as(ratios[name]) for name, part in zip(ratios, parts, strict=True)}

    heads = head_ratio(state, prices).masked_fill(state.families["head"].dead, -1.0)
    place = torch.searchsorted(ratio[order], heads.flatten()).view_as(heads)
    share = torch.cat([below.new_zeros(1), below]) / below[-1]
    q["head"] = share[place]
    return q


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

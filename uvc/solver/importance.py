"""The score q of every group on one scale: first-order importance per cost."""

import torch
from torch import Tensor

from uvc.costs import Prices
from uvc.solver.state import FAMILIES, State

ABSENT = -2.0  # in the place of a ratio: before all others, with no cost


def group_prices(state: State, prices: Prices) -> dict[str, Tensor]:
    """[S, 1] per family: what a group of q/k dims, a v dim and a neuron of each segment costs."""
    unit = state.geometry.unit
    row = {n: unit(n) * state.theta.new_tensor(getattr(prices, n))[:, None] for n in FAMILIES}
    return {n: p if n == "neuron" else p.repeat_interleave(state.geometry.heads, 0) for n, p in row.items()}


def quantiles(state: State, prices: Prices) -> dict[str, Tensor]:
    """q of every family and of the buckets of tokens ("token"), [S, G] in [0, 1]: the share of the prunable
    cost with lower importance per cost.

    One scale for all layers and families, and free of the loss's unit: at the optimum a group is removed
    where q < z, and z is then close to the removed share of the cost. Dead groups rank lowest. What is held
    is no part of the prunable cost, and its q is infinite.
    """
    units = group_prices(state, prices)
    ratios = {
        name: (state.families[name].importance / price)
        .masked_fill(state.families[name].dead, -1.0)
        .masked_fill(state.families[name].absent, ABSENT)
        .masked_fill(state.families[name].held(), torch.inf)
        for name, price in units.items()
    }
    ratios["token"], units["token"] = state.tokens.ratio(), state.tokens.price[:, None]
    ratio = torch.cat([part.flatten() for part in ratios.values()])
    weight = torch.cat([price.expand_as(ratios[name]).flatten() for name, price in units.items()])
    weight = weight.masked_fill(ratio.isinf() | (ratio == ABSENT), 0.0)
    order = ratio.argsort(stable=True)
    below = weight[order].cumsum(0)
    score = torch.empty_like(ratio).scatter_(0, order, (below - weight[order]) / below[-1])
    score = score.masked_fill(ratio.isinf(), torch.inf)
    parts = score.split([part.numel() for part in ratios.values()])
    return {name: part.view_as(ratios[name]) for name, part in zip(ratios, parts, strict=True)}

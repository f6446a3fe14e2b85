"""The score q of every group on one scale: first-order importance per cost."""

import torch
from torch import Tensor

from uvc.costs import Prices
from uvc.solver.state import State


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

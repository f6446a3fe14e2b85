"""The last step of a search: from what is alive to a structure that meets the budget exactly.

A greedy walk in both directions over units (q/k dims, v dims, neurons, whole heads) by first-order importance
per cost. Afterwards the cost is at most the budget and no removed unit of a living half and head fits any
more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from uvc.budget import Prices
from uvc.solver.objective import group_prices, head_ratio, masks_cost
from uvc.solver.state import FAMILIES, State

# q/k dims and v dims [L, H, K], neurons [L, F], running halves [L, 2]
Masks = tuple[Tensor, Tensor, Tensor, Tensor]


def project_to_budget(
    state: State, prices: Prices, budget_cost: float, families: Sequence[str] = FAMILIES
) -> Masks:
    """Masks of the kept units, of cost at most ``budget_cost``; units of other families than the given ones
    stay.

    ValueError when even a model without any unit costs more.
    """
    masks = tuple(mask.clone() for mask in state.alive())
    cost = _walk_down(state, masks, prices, budget_cost, families)
    _walk_up(state, masks, prices, budget_cost - cost)
    return masks


def _walk_down(
    state: State, masks: Masks, prices: Prices, budget_cost: float, families: Sequence[str]
) -> float:
    """Removes units, least importance per cost first, until the budget holds; returns the cost."""
    qk, v, neuron, running = masks
    cost = masks_cost(*masks, prices)
    for _, name, index in _candidates(state, masks, prices):
        if name not in families:
            continue
        if cost <= budget_cost:
            return cost
        layer = index[0]
        if not running[layer, 1 if name == "neuron" else 0]:
            continue
        if name == "neuron":
            neuron[index] = False
            cost -= prices.neuron[layer]
            continue
        head = index[:2]
        if not v[head].any() or (name != "head" and not {"qk": qk, "v": v}[name][index]):
            continue
        n_qk, n_v = int(qk[head].sum()), int(v[head].sum())
        if name == "head" or (name == "v" and n_v == 1):
            saved = prices.qk[layer] * n_qk + prices.v[layer] * n_v
            if name == "head" and cost - saved < budget_cost:
                continue
            qk[head], v[head] = False, False
        else:
            saved = getattr(prices, name)[layer]
            {"qk": qk, "v": v}[name][index] = False
        cost -= saved
    for half in state.theta.flatten().argsort(stable=True).tolist():
        if cost <= budget_cost:
            return cost
        running.view(-1)[half] = False
        cost = masks_cost(*masks, prices)
    if cost > budget_cost:
        raise ValueError(
            f"budget: {budget_cost:.0f} cannot be met; a model with every block skipped costs {cost:.0f}"
        )
    return cost


def _walk_up(state: State, masks: Masks, prices: Prices, room: float) -> None:
    """Puts back the most important removed units that fit, in living halves and heads."""
    qk, v, neuron, running = masks
    living = v.any(-1, keepdim=True) & running[:, :1, None]
    open_ = {"qk": living & ~qk, "v": living & ~v, "neuron": running[:, 1:] & ~neuron}
    if room < min(min(getattr(prices, name)) for name in open_):
        return
    price = group_prices(state, prices)
    units = []
    for name, mask in open_.items():
        ratio = (state.families[name].importance / price[name]).view(mask.shape)[mask]
        units += zip(ratio.tolist(), [name] * len(ratio), map(tuple, mask.nonzero().tolist()), strict=True)
    for _, name, index in sorted(units, reverse=True):
        unit = getattr(prices, name)[index[0]]
        if unit <= room:
            {"qk": qk, "v": v, "neuron": neuron}[name][index] = True
            room -= unit


def _candidates(state: State, masks: Masks, prices: Prices) -> list[tuple[float, str, tuple[int, ...]]]:
    """(importance per cost, family, index) of every living unit, ascending."""
    qk, v, neuron, _ = masks
    ratios = {name: state.families[name].importance / p for name, p in group_prices(state, prices).items()}
    ratios["head"] = head_ratio(state, prices)
    units: list[tuple[float, str, tuple[int, ...]]] = []
    for name, mask in (("qk", qk), ("v", v), ("neuron", neuron), ("head", v.any(-1))):
        ratio = ratios[name].view(mask.shape)[mask]
        units += zip(ratio.tolist(), [name] * len(ratio), map(tuple, mask.nonzero().tolist()), strict=True)
    return sorted(units)

"""One solver step: prox, primal, dual, snap, in that order. Sources: UVC (ICLR 2022), algorithm 1; UMEC (ICLR
2021).

Where it differs from the published code, and why: s and r are fractions; scores are first-order importance
per marginal cost on one scale (``importance.quantiles``), so each coordinate's gradient is divided by its own
cost (a diagonal preconditioner) and reads q_next - z; y and p act in the prox alone; y, p and z unwind; a
group is removed for good only when the prox has brought it to zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import Prices, total
from uvc.solver.importance import quantiles
from uvc.solver.objective import masks_counts, soft_cost, used, weights
from uvc.solver.state import Factors, State


def prox(state: State, config: SolverConfig) -> Factors:
    """prox of y * ||w_S||^2 on the removed groups S: w <- w / (1 + 2 eta y)."""
    geo, factor = state.geometry, {}
    for name, family in state.families.items():
        shrink = 1.0 / (1.0 + 2.0 * config.prox_rate * family.y)
        factor[name] = geo.spread(name, torch.where(family.removed() & ~family.dead, shrink[:, None], 1.0))
    return Factors(**factor)


def primal(state: State, prices: Prices, config: SolverConfig) -> None:
    """s <- s + rate * (s* - s), for s and r, with s* the minimiser along the segment.

    With x = s G removed groups the Lagrangian along a segment is the convex piecewise linear sum of (q_i - z)
    over the x smallest; it is least at x* = the number of groups with q < z. Of several limits z is the sum.
    y and p are taken at rest here, at 1: with them, what has not been shrunk yet would count for its norm,
    not for its worth.
    """
    scores, z = quantiles(state, prices), state.z.sum()
    for name in config.families:
        family = state.families[name]
        best = (scores[name] < z).to(family.s.dtype).mean(1)
        dead = family.dead.to(family.s.dtype).mean(1)
        family.s.copy_(torch.maximum(family.s + config.primal_rate * (best - family.s), dead))
    state.tokens.approach((scores["token"] < z).to(state.theta.dtype).mean(1), config.primal_rate)


def dual(
    state: State,
    norms: dict[str, Tensor],
    limits: Sequence[Limit],
    targets: Sequence[float],
    tightened: Sequence[float],
    config: SolverConfig,
) -> None:
    """y, p += rate * (norm left in removed groups), unwinding to 1; z += rate * (R - target) + the price of
    ``tightened``, kept in [0, 2], for every limit.

    tightened: how far each target has come down since the last step. Groups with q < z are a share z of the
    prunable cost, so z must rise by that much over the prunable share of the cost; several limits share it.
    norms: squared norm per group [S, G]. The norm left is taken relative to the family's initial mean and to
    the segment's size. The share that tokens cost counts as prunable, too.
    """
    for name, family in state.families.items():
        left = (norms[name] * family.removed()).sum(1) / (family.scale * family.dead.shape[1]) / family.own()
        family.y.copy_(1.0 + (family.y - 1.0) * (1.0 - config.dual_leak) + config.dual_rate * left)
        family.y.clamp_(1.0, config.dual_max)
    shares, least = weights(state.z.tolist()), masks_counts(state.least())
    for m, (limit, target) in enumerate(zip(limits, targets, strict=True)):
        error = soft_cost(state, limit.costs) / limit.dense - target
        prunable = 1.0 - total(limit.costs, least) / limit.dense + state.tokens.shares[m]
        state.z[m] += config.budget_rate * error + shares[m] * tightened[m] / max(prunable, 1e-9)
    state.z.clamp_(0.0, 2.0)


def snap(state: State, norms: dict[str, Tensor], limits: Sequence[Limit], config: SolverConfig) -> bool:
    """Removed groups whose squared norm is below the tolerance are dead from here on, the smallest first, as
    many as leave a limit reached. True if any is: their weights are then to be set to zero.

    A head without v dims has no q/k dims either. When the cost of any one group more would leave no limit
    reached, the solver settles: groups that were on their way out are released, so that they serve for the
    rest of the search.
    """
    changed = False
    for name, family in state.families.items():
        small = norms[name] < config.snap * family.scale
        ready = family.removed() & small & ~family.dead
        if ready.any():
            changed |= _mark(state, name, ready, norms[name], limits)
    state.settled = _settled(state, limits, config)
    for family in state.families.values():
        dead = family.dead.to(family.s.dtype).mean(1)
        family.s.copy_(dead if state.settled else torch.maximum(family.s, dead))
    return changed


def _mark(state: State, name: str, ready: Tensor, norms: Tensor, limits: Sequence[Limit]) -> bool:
    """Marks the ``ready`` groups dead, smallest norm first, as many as leave a limit reached: bisection."""
    order = norms.masked_fill(~ready, torch.inf).flatten().argsort(stable=True)
    before = {n: family.dead.clone() for n, family in state.families.items()}

    def try_first(count: int) -> bool:
        for n, family in state.families.items():
            family.dead.copy_(before[n])
        state.families[name].dead.view(-1)[order[:count]] = True
        state.families["qk"].dead |= ~state.heads().view(-1, 1)
        return used(state.alive(), limits) >= 1.0

    low, high = 0, int(ready.sum())
    if try_first(high):
        return True
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if try_first(middle) else (low, middle)
    try_first(low)
    return low > 0


def _settled(state: State, limits: Sequence[Limit], config: SolverConfig) -> bool:
    """Whether the removal of any one group more would bring the cost below every budget."""
    counts = masks_counts(state.alive())
    some = {name: ~family.dead & family.free()[:, None] for name, family in state.families.items()}
    some = {name: some[name].view(state.geometry.layers, -1).any(1).tolist() for name in config.families}
    for limit in limits:
        prices = limit.costs.at(counts)._asdict()
        unit = state.geometry.unit
        units = [unit(n) * p for n in some for p, left in zip(prices[n], some[n], strict=True) if left]
        if total(limit.costs, counts) - min(units, default=0) >= limit.most:
            return False
    return True

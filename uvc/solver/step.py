"""One solver step: prox, primal, dual, project, in that order. Sources: UVC (ICLR 2022), algorithm 1; UMEC
(ICLR 2021).

Where it differs from the published code, and why: s and r are fractions; scores are first-order importance
per marginal cost on one scale (``objective.quantiles``), so each coordinate's gradient is divided by its own
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
    """prox of y * ||w_S||^2 on the removed groups S: w <- w / (1 + 2 eta y). A removed head shrinks through
    its v dims.
    """
    shape = (state.geometry.layers, state.geometry.heads, state.geometry.head_dim)
    factor = {}
    for name, family in state.families.items():
        shrink = 1.0 / (1.0 + 2.0 * config.prox_rate * family.y)
        factor[name] = torch.where(family.removed() & ~family.dead, shrink[:, None], 1.0)
    v = torch.minimum(factor["v"].view(shape), factor["head"][:, :, None])
    return Factors(factor["qk"].view(shape), v, factor["neuron"])


def primal(state: State, prices: Prices, config: SolverConfig) -> None:
    """s <- s + rate * (s* - s), for s and r, with s* the minimiser along the segment.

    With x = s G removed groups the Lagrangian along a segment is the convex piecewise linear sum of (q_i - z)
    over the x smallest; it is least at x* = the number of groups with q < z. Of several limits z is the sum.
    Dims move in surviving heads only. y and p stand at rest here, at 1: what has not been shrunk yet would
    look dear for its norm, not for its worth.
    """
    scores = quantiles(state, prices)
    surviving = ~state.families["head"].removed()
    for name in config.families:
        family = state.families[name]
        best = (scores[name] < state.z.sum()).to(family.s.dtype).mean(1)
        move = best - family.s
        if name in ("qk", "v"):
            move = move * surviving.flatten()
        dead = family.dead.to(family.s.dtype).mean(1)
        family.s.copy_(torch.maximum(family.s + config.primal_rate * move, dead))
    if state.tokens is not None:
        best = (scores["token"] < state.z.sum()).to(state.tokens.s.dtype).mean(1)
        state.tokens.approach(best, config.primal_rate)


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
    the segment's size. What a share of the tokens costs goes along with that of all other groups.
    """
    for name, family in state.families.items():
        left = (norms[name] * family.removed()).sum(1) / (family.scale * family.dead.shape[1])
        family.y.copy_(1.0 + (family.y - 1.0) * (1.0 - config.dual_leak) + config.dual_rate * left)
        family.y.clamp_(1.0, config.dual_max)
    shares = weights(state.z.tolist())
    for m, (limit, target) in enumerate(zip(limits, targets, strict=True)):
        error = soft_cost(state, limit.costs) / limit.dense - target
        prunable = 1.0 - limit.smallest + (state.tokens.shares[m] if state.tokens is not None else 0.0)
        state.z[m] += config.budget_rate * error + shares[m] * tightened[m] / prunable
    state.z.clamp_(0.0, 2.0)


def project(state: State, norms: dict[str, Tensor], limits: Sequence[Limit], config: SolverConfig) -> bool:
    """Snaps removed groups whose norm has reached the tolerance to zero (``dead``), never below the budget.
    True if any was.

    A head dies with all its dims; a head whose last v dim dies is dead. When no further unit can go, the
    solver settles: groups that were on their way out are released, so that they serve for the rest of the
    search.
    """
    changed = False
    for name, family in state.families.items():
        small = norms[name] < config.snap * family.scale
        ready = family.removed() & small & ~family.dead
        if ready.any():
            changed |= _bury(state, name, ready, norms[name], limits)
    state.settled = _settled(state, limits, config)
    for family in state.families.values():
        dead = family.dead.to(family.s.dtype).mean(1)
        family.s.copy_(dead if state.settled else torch.maximum(family.s, dead))
    return changed


def _settled(state: State, limits: Sequence[Limit], config: SolverConfig) -> bool:
    """Whether the removal of any further group would leave every limit less than used up."""
    counts = masks_counts(*state.alive())
    kept = [counts._asdict()[name] if name in config.families else () for name in ("qk", "v", "neuron")]
    for limit in limits:
        prices = limit.costs.at(counts)
        open_ = [
            price
            for part, numbers in zip((prices.qk, prices.v, prices.neuron), kept, strict=True)
            for price, number in zip(part, numbers, strict=False)
            if number
        ]
        if total(limit.costs, counts) - min(open_, default=0) >= limit.most:
            return False
    return True


def _bury(state: State, name: str, ready: Tensor, norms: Tensor, limits: Sequence[Limit]) -> bool:
    """Marks the ``ready`` groups dead, smallest norm first, as many as leave a limit used up (by
    bisection).
    """
    order = norms.masked_fill(~ready, torch.inf).flatten().argsort(stable=True)
    before = {n: f.dead.clone() for n, f in state.families.items()}

    def try_first(count: int) -> bool:
        for n, f in state.families.items():
            f.dead.copy_(before[n])
        state.families[name].dead.view(-1)[order[:count]] = True
        _close(state)
        return used(state, limits) >= 1.0

    low, high = 0, int(ready.sum())
    if try_first(high):
        return True
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if try_first(middle) else (low, middle)
    try_first(low)
    return low > 0


def _close(state: State) -> None:
    """Makes the dead masks agree: dead head <=> all its v dims dead; a dead head's q/k dims are dead."""
    head, qk, v = (state.families[n].dead for n in ("head", "qk", "v"))
    v |= head.view(-1, 1)
    head |= v.all(1).view_as(head)
    qk |= head.view(-1, 1)

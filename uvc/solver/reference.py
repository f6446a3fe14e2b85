"""The slow twin of ``step``: the same algorithm in loops over layers, heads and groups, on plain numbers.
Tests step both together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import BlockCounts, Costs, Counts, Prices
from uvc.solver.state import FAMILIES, State

Rows = list[list[float]]


@dataclass
class SlowState:
    """Lists instead of tensors; fields as in ``State`` and ``Family``, keyed by family.

    Only what is there: a list has the length of its layer's head dim or neurons. places: the layer of each
    segment.
    """

    layers: int
    places: dict[str, list[int]]
    importance: dict[str, Rows]
    s: dict[str, list[float]]
    y: dict[str, list[float]]
    dead: dict[str, list[list[bool]]]
    open: dict[str, list[bool]]
    scale: dict[str, float]
    multiple: dict[str, int]
    gate: Rows
    running: list[list[bool]]
    settled: bool
    z: list[float]
    token_importance: Rows
    token_s: list[float]
    token_price: list[float]
    token_shares: list[float]

    @classmethod
    def of(cls, state: State) -> SlowState:
        geo, families, tokens = state.geometry, state.families, state.tokens
        there = {n: (~families[n].absent.all(1)).nonzero().flatten().tolist() for n in FAMILIES}

        def rows(field: str) -> dict[str, list]:
            found = {n: getattr(families[n], field) for n in FAMILIES}
            whole = found["qk"].dim() == 1
            return {
                n: [(t[i] if whole else t[i][~families[n].absent[i]]).tolist() for i in there[n]]
                for n, t in found.items()
            }

        of_own = {n: families[n].own().tolist() for n in FAMILIES}
        return cls(
            geo.layers,
            {n: [i if n == "neuron" else i // geo.heads for i in there[n]] for n in FAMILIES},
            rows("importance"),
            {n: [1.0 - (1.0 - float(families[n].s[i])) / of_own[n][i] for i in there[n]] for n in FAMILIES},
            *map(rows, ("y", "dead", "open")),
            {n: families[n].scale for n in FAMILIES},
            {n: families[n].multiple for n in FAMILIES},
            state.gates().tolist(),
            state.running().tolist(),
            state.settled,
            state.z.tolist(),
            tokens.importance.tolist(),
            tokens.s.tolist(),
            tokens.price.tolist(),
            tokens.shares,
        )

    def order(self, family: str, segment: int) -> list[int]:
        """Groups of a segment, least important first, dead ones before all others."""
        importance, dead = self.importance[family][segment], self.dead[family][segment]
        return sorted(range(len(dead)), key=lambda g: -1.0 if dead[g] else importance[g])

    def removed(self, family: str, segment: int) -> set[int]:
        order, multiple = self.order(family, segment), self.multiple[family]
        return set(order[: round(self.s[family][segment] * len(order) - 1e-4) // multiple * multiple])

    def layer(self, family: str, segment: int) -> int:
        return self.places[family][segment]

    def headless(self, segment: int) -> bool:
        """Whether no v dim of a head is left."""
        return all(self.dead["v"][segment])


def prox(state: SlowState, config: SolverConfig) -> dict[str, Rows]:
    """Factor of every group, per family."""
    factor = {}
    for family in FAMILIES:
        factor[family] = []
        for segment, dead in enumerate(state.dead[family]):
            shrink = 1.0 / (1.0 + 2.0 * config.prox_rate * state.y[family][segment])
            removed = state.removed(family, segment)
            factor[family].append([shrink if g in removed and not dead[g] else 1.0 for g in range(len(dead))])
    return factor


def quantiles(state: SlowState, prices: Prices) -> dict[str, Rows]:
    """Share of the prunable cost with lower importance per cost, per group."""
    units, score = [], {n: [[math.inf] * len(dead) for dead in state.dead[n]] for n in FAMILIES}
    for family in FAMILIES:
        for segment, dead in enumerate(state.dead[family]):
            price = getattr(prices, family)[state.layer(family, segment)]
            for g in range(len(dead)):
                ratio = -1.0 if dead[g] else state.importance[family][segment][g] / price
                if dead[g] or state.open[family][segment]:
                    units.append((ratio, price, family, segment, g))
    for site, row in enumerate(state.token_importance):
        for b in range(len(row)):
            units.append((token_ratio(state, site, b), state.token_price[site], "token", site, b))
    units.sort(key=lambda unit: unit[0])
    whole = sum(unit[1] for unit in units)
    score["token"] = [[0.0] * len(row) for row in state.token_importance]
    below = 0.0
    for _, price, family, segment, g in units:
        score[family][segment][g] = below / whole
        below += price
    return score


def primal(state: SlowState, prices: Prices, config: SolverConfig) -> None:
    """One step of every s and r towards the minimiser along its segment."""
    scores = quantiles(state, prices)
    for family in config.families:
        for segment, row in enumerate(scores[family]):
            best = sum(q < sum(state.z) for q in row) / len(row)
            dead = sum(state.dead[family][segment]) / len(row)
            s = state.s[family][segment]
            state.s[family][segment] = max(s + config.primal_rate * (best - s), dead)
    for site in reversed(range(len(state.token_s))):
        row, s = scores["token"][site], state.token_s[site]
        best = sum(q < sum(state.z) for q in row) / len(row)
        most = min([1.0 - 1.0 / len(row), *state.token_s[site + 1 : site + 2]])
        state.token_s[site] = min(s + config.primal_rate * (best - s), most)


def token_ratio(state: SlowState, site: int, bucket: int) -> float:
    """The most that a bucket ranked no better, there or at a later site, is worth per cost."""
    return max(
        state.token_importance[later][b] / state.token_price[later]
        for later in range(site, len(state.token_s))
        for b in range(bucket + 1)
    )


def marginal(state: SlowState, limits: Sequence[Limit]) -> Prices:
    """Price of a unit: of every limit, as a share of the dense cost, weighed by its z."""
    whole, kept = sum(state.z), soft_counts(state)
    parts = {name: [0.0] * state.layers for name in ("attn", "mlp", "qk", "v", "neuron")}
    fixed = 0.0
    for m, limit in enumerate(limits):
        share = state.z[m] / whole if whole > 0.0 else 1.0 / len(limits)
        prices = limit.costs.at(kept)
        fixed += share * prices.fixed / limit.dense * limits[0].dense
        for name, row in parts.items():
            for layer in range(state.layers):
                row[layer] += share * getattr(prices, name)[layer] / limit.dense * limits[0].dense
    return Prices(fixed, **{name: tuple(row) for name, row in parts.items()})


def soft_counts(state: SlowState) -> Counts:
    """What s, r and g keep of every layer."""
    rows = []
    for layer in range(state.layers):
        n_qk = n_v = heads = 0.0
        for segment, dead in enumerate(state.dead["v"]):
            if state.layer("v", segment) == layer and not state.headless(segment):
                heads += 1.0
                n_qk += (1.0 - state.s["qk"][segment]) * len(state.dead["qk"][segment])
                n_v += (1.0 - state.s["v"][segment]) * len(dead)
        neurons = (1.0 - state.s["neuron"][layer]) * len(state.dead["neuron"][layer])
        rows.append((*state.gate[layer], n_qk, n_v, neurons, heads))
    return Counts(*zip(*rows, strict=True))


def soft_cost(state: SlowState, costs: Costs) -> float:
    """R(s, r, g), not yet divided by the dense cost."""
    return cost_of(soft_counts(state), costs)


def cost_of(counts: Counts, costs: Costs) -> float:
    """What these counts cost."""
    blocks = enumerate(zip(*counts, strict=True))
    return costs.fixed + sum(costs.block(layer, BlockCounts(*kept)) for layer, kept in blocks)


def hard_counts(state: SlowState, held_only: bool = False) -> Counts:
    """What is alive in every layer, or only what has to stay: alive in segments that are not open."""
    rows = []
    for layer in range(state.layers):
        kept = dict.fromkeys((*FAMILIES, "heads"), 0)
        for family in FAMILIES:
            for segment, dead in enumerate(state.dead[family]):
                stays = not (held_only and state.open[family][segment])
                if state.layer(family, segment) == layer and stays:
                    alive = sum(not d for d in dead)
                    headless = family == "qk" and (
                        state.headless(segment) or (held_only and state.open["v"][segment])
                    )
                    kept[family] += 0 if headless else alive
                    kept["heads"] += family == "v" and alive > 0
        runs = (kept["v"] > 0, kept["neuron"] > 0) if held_only else state.running[layer]
        rows.append((*runs, kept["qk"], kept["v"], kept["neuron"], kept["heads"]))
    return Counts(*zip(*rows, strict=True))


def dual(
    state: SlowState,
    norms: dict[str, Rows],
    limits: Sequence[Limit],
    targets: Sequence[float],
    tightened: Sequence[float],
    config: SolverConfig,
) -> None:
    """Multipliers of the norms and of the budgets."""
    for family in FAMILIES:
        for segment, row in enumerate(norms[family]):
            left = sum(row[g] for g in state.removed(family, segment)) / (state.scale[family] * len(row))
            y = 1.0 + (state.y[family][segment] - 1.0) * (1.0 - config.dual_leak) + config.dual_rate * left
            state.y[family][segment] = min(max(y, 1.0), config.dual_max)
    whole = sum(state.z)
    shares = [z / whole if whole > 0.0 else 1.0 / len(limits) for z in state.z]
    for m, limit in enumerate(limits):
        least = cost_of(hard_counts(state, held_only=True), limit.costs)
        prunable = 1.0 - least / limit.dense + state.token_shares[m]
        error = soft_cost(state, limit.costs) / limit.dense - targets[m]
        z = state.z[m] + config.budget_rate * error + shares[m] * tightened[m] / max(prunable, 1e-9)
        state.z[m] = min(max(z, 0.0), 2.0)


def snap(state: SlowState, norms: dict[str, Rows], limits: Sequence[Limit], config: SolverConfig) -> bool:
    """Removed groups of small norm die one by one, the smallest first, while a limit stays reached."""
    changed = False
    for family in FAMILIES:
        ready = []
        for segment, row in enumerate(norms[family]):
            for g in state.removed(family, segment):
                if row[g] < config.snap * state.scale[family] and not state.dead[family][segment][g]:
                    ready.append((row[g], segment, g))
        for _, segment, g in sorted(ready):
            before = [list(row) for row in state.dead["qk"]]
            state.dead[family][segment][g] = True
            for head, row in enumerate(before):
                if state.headless(head):
                    state.dead["qk"][head] = [True] * len(row)
            if not reached(state, limits):
                state.dead["qk"] = before
                state.dead[family][segment][g] = False
                break
            changed = True
    state.settled = settled(state, limits, config)
    for family in FAMILIES:
        for segment, row in enumerate(state.dead[family]):
            dead = sum(row) / len(row)
            s = state.s[family]
            s[segment] = dead if state.settled else max(s[segment], dead)
    return changed


def reached(state: SlowState, limits: Sequence[Limit]) -> bool:
    """Whether what is alive costs at least all that some limit allows."""
    return any(cost_of(hard_counts(state), limit.costs) / limit.most >= 1.0 for limit in limits)


def settled(state: SlowState, limits: Sequence[Limit], config: SolverConfig) -> bool:
    """Whether the removal of any one group more would bring the cost below every limit."""
    counts = hard_counts(state)
    for limit in limits:
        prices, units = limit.costs.at(counts), []
        for family in config.families:
            for segment, dead in enumerate(state.dead[family]):
                if state.open[family][segment] and not all(dead):
                    units.append(getattr(prices, family)[state.layer(family, segment)])
        if cost_of(counts, limit.costs) - min(units, default=0) >= limit.most:
            return False
    return True

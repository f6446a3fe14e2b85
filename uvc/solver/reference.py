"""The slow twin of ``step``: the same algorithm in loops over layers, heads and groups, on plain numbers.
Tests step both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import BlockCounts, Costs, Counts, Prices
from uvc.solver.state import FAMILIES, State, TokenState

Rows = list[list[float]]


@dataclass
class SlowState:
    """Lists instead of tensors; fields as in ``State`` and ``Family``, keyed by family."""

    layers: int
    heads: int
    head_dim: int
    hidden: int
    importance: dict[str, Rows]
    s: dict[str, list[float]]
    y: dict[str, list[float]]
    dead: dict[str, list[list[bool]]]
    scale: dict[str, float]
    grain: dict[str, int]
    gate: Rows
    z: list[float]
    token_importance: Rows
    token_s: list[float]
    token_price: list[float]
    token_shares: list[float]

    @classmethod
    def of(cls, state: State) -> SlowState:
        geo, families = state.geometry, state.families
        return cls(
            geo.layers,
            geo.heads,
            geo.head_dim,
            geo.hidden,
            {n: families[n].importance.tolist() for n in FAMILIES},
            {n: families[n].s.tolist() for n in FAMILIES},
            {n: families[n].y.tolist() for n in FAMILIES},
            {n: families[n].dead.tolist() for n in FAMILIES},
            {n: families[n].scale for n in FAMILIES},
            {n: families[n].grain for n in FAMILIES},
            state.gates().tolist(),
            state.z.tolist(),
            *([], [], [], []) if state.tokens is None else tokens_of(state.tokens),
        )

    def order(self, family: str, segment: int) -> list[int]:
        """Groups of a segment, least important first, dead ones before all others."""
        importance, dead = self.importance[family][segment], self.dead[family][segment]
        return sorted(range(len(dead)), key=lambda g: -1.0 if dead[g] else importance[g])

    def removed(self, family: str, segment: int) -> set[int]:
        order = self.order(family, segment)
        grain = self.grain[family]
        return set(order[: round(self.s[family][segment] * len(order) - 1e-4) // grain * grain])


def prox(state: SlowState, config: SolverConfig) -> dict[str, Rows]:
    """Factor of every group, per family; a v dim takes the smaller of its own and its head's."""
    factor = {}
    for family in FAMILIES:
        factor[family] = []
        for segment, dead in enumerate(state.dead[family]):
            shrink = 1.0 / (1.0 + 2.0 * config.prox_rate * state.y[family][segment])
            removed = state.removed(family, segment)
            factor[family].append([shrink if g in removed and not dead[g] else 1.0 for g in range(len(dead))])
    for layer in range(state.layers):
        for head in range(state.heads):
            row = factor["v"][layer * state.heads + head]
            for k in range(state.head_dim):
                row[k] = min(row[k], factor["head"][layer][head])
    return factor


def quantiles(state: SlowState, prices: Prices) -> dict[str, Rows]:
    """Share of the prunable cost with lower importance per cost, per group."""
    units = []
    for family in ("qk", "v", "neuron"):
        for segment, dead in enumerate(state.dead[family]):
            price = getattr(prices, family)[segment if family == "neuron" else segment // state.heads]
            for g in range(len(dead)):
                ratio = -1.0 if dead[g] else state.importance[family][segment][g] / price
                units.append((ratio, price, family, segment, g))
    for site, row in enumerate(state.token_importance):
        for b in range(len(row)):
            units.append((token_ratio(state, site, b), state.token_price[site], "token", site, b))
    units.sort(key=lambda unit: unit[0])
    whole = sum(unit[1] for unit in units)
    score = {n: [[0.0] * len(dead) for dead in state.dead[n]] for n in FAMILIES}
    score["token"] = [[0.0] * len(row) for row in state.token_importance]
    below = 0.0
    for _, price, family, segment, g in units:
        score[family][segment][g] = below / whole
        below += price
    for layer in range(state.layers):
        for head in range(state.heads):
            segment, worth, cost = layer * state.heads + head, 0.0, 0.0
            least = min(prices.qk[layer], prices.v[layer])
            for family in ("qk", "v"):
                kept = set(range(state.head_dim)) - state.removed(family, segment)
                worth += sum(state.importance[family][segment][g] for g in kept)
                cost += getattr(prices, family)[layer] * len(kept)
            ratio = (1.0 - 1e-6) * max(worth, state.importance["head"][layer][head]) / max(cost, least)
            ratio = -1.0 if state.dead["head"][layer][head] else ratio
            score["head"][layer][head] = sum(unit[1] for unit in units if unit[0] < ratio) / whole
    return score


def primal(state: SlowState, prices: Prices, config: SolverConfig) -> None:
    """One step of every s and r towards the minimiser along its segment."""
    scores = quantiles(state, prices)
    removed_heads = [state.removed("head", layer) for layer in range(state.layers)]
    for family in config.families:
        for segment, row in enumerate(scores[family]):
            if family in ("qk", "v") and segment % state.heads in removed_heads[segment // state.heads]:
                move = 0.0
            else:
                best = sum(q < sum(state.z) for q in row) / len(row)
                move = best - state.s[family][segment]
            dead = sum(state.dead[family][segment]) / len(row)
            state.s[family][segment] = max(state.s[family][segment] + config.primal_rate * move, dead)
    for site in reversed(range(len(state.token_s))):
        row, s = scores["token"][site], state.token_s[site]
        best = sum(q < sum(state.z) for q in row) / len(row)
        most = min([1.0 - 1.0 / len(row), *state.token_s[site + 1 : site + 2]])
        state.token_s[site] = min(s + config.primal_rate * (best - s), most)


def tokens_of(tokens: TokenState) -> tuple[Rows, list[float], list[float], list[float]]:
    """Importance, s, price and shares, as lists."""
    return tokens.importance.tolist(), tokens.s.tolist(), tokens.price.tolist(), tokens.shares


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
        for place, head in enumerate(state.order("head", layer)):
            survive = min(max(place + 1 - state.s["head"][layer] * state.heads, 0.0), 1.0)
            segment = layer * state.heads + head
            heads += survive
            n_qk += survive * (1.0 - state.s["qk"][segment]) * state.head_dim
            n_v += survive * (1.0 - state.s["v"][segment]) * state.head_dim
        rows.append((*state.gate[layer], n_qk, n_v, (1.0 - state.s["neuron"][layer]) * state.hidden, heads))
    return Counts(*zip(*rows, strict=True))


def soft_cost(state: SlowState, costs: Costs) -> float:
    """R(s, r, g), not yet divided by the dense cost."""
    blocks = enumerate(zip(*soft_counts(state), strict=True))
    return costs.fixed + sum(costs.block(layer, BlockCounts(*kept)) for layer, kept in blocks)


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
        prunable = (
            1.0 - limit.costs.fixed / limit.dense + (state.token_shares[m] if state.token_shares else 0.0)
        )
        error = soft_cost(state, limit.costs) / limit.dense - targets[m]
        z = state.z[m] + config.budget_rate * error + shares[m] * tightened[m] / prunable
        state.z[m] = min(max(z, 0.0), 2.0)

"""The last step of a search: from what is alive to a structure that meets every budget exactly.

A greedy walk in both directions by first-order importance per cost, over bundles: the groups of a segment in
the order of their importance, as many at a time as the family's multiple. A head is removed with its last v
dims. Afterwards no budget is exceeded and no removed bundle of a kept half and head fits any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch

from uvc.constraints import Limit
from uvc.costs import BlockCounts
from uvc.solver.importance import group_prices
from uvc.solver.objective import marginal, masks_counts
from uvc.solver.state import FAMILIES, Masks, State

# importance per cost, family, segment, place of the bundle in its segment
Bundle = tuple[float, str, int, int]


def round_to_budget(
    state: State,
    limits: Sequence[Limit],
    families: Sequence[str] = FAMILIES,
) -> Masks:
    """Masks of what is kept, which costs at most what the limits allow; groups of other families than the
    given ones stay, and so do those that are held.

    Groups are kept in multiples, as their family has it. ValueError when what must stay costs more.
    """
    walk = _Walk(state, limits)
    walk.down(families)
    while walk.up():
        pass
    return walk.masks()


class _Walk:
    """The structure on its way: kept bundles, and what every block keeps and costs."""

    def __init__(self, state: State, limits: Sequence[Limit]) -> None:
        self.state, self.limits, self.heads = state, limits, state.geometry.heads
        self.size = {name: family.multiple for name, family in state.families.items()}
        self.order, self.ratio, self.kept, self.gone = {}, {}, {}, {}
        all_alive = state.alive()
        for name, price in group_prices(state, marginal(state, limits)).items():
            family, shape = state.families[name], (-1, self.size[name])
            alive = state.geometry.gathered(name, getattr(all_alive, name).int()) > 0
            # What was gone before comes first, whole bundles, then what is dead; a bundle with a living group
            # is kept whole.
            importance = family.importance.masked_fill(~alive, -1.0).masked_fill(family.gone, -2.0)
            order = importance.argsort(dim=1, stable=True)
            self.order[name] = order
            self.ratio[name] = (family.importance / price).gather(1, order).unflatten(1, shape).mean(2)
            self.kept[name] = alive.gather(1, order).unflatten(1, shape).any(2).tolist()
            self.gone[name] = family.gone.gather(1, order).unflatten(1, shape).any(2)
        self.running = all_alive.running.tolist()
        self.blocks = [BlockCounts(*kept) for kept in zip(*masks_counts(self.masks()), strict=True)]
        self.costs = [[limit.costs.block(*block) for block in enumerate(self.blocks)] for limit in limits]

    def units(self, name: str) -> int:
        """Dims or neurons of a bundle."""
        return self.size[name] * self.state.geometry.unit(name)

    def masks(self) -> Masks:
        """The kept groups."""
        geo, found = self.state.geometry, {}
        for name, order in self.order.items():
            kept = torch.tensor(self.kept[name], device=order.device)
            kept = kept.repeat_interleave(self.size[name], 1)
            found[name] = geo.spread(name, torch.zeros_like(kept).scatter_(1, order, kept))
        v = found["v"]
        qk = found["qk"] & v.any(-1, keepdim=True)
        return Masks(qk, v, found["neuron"], torch.tensor(self.running, device=v.device))

    def used(self, layer: int = 0, block: BlockCounts | None = None) -> float:
        """Cost over what may be spent, of the limit furthest from being met, if ``layer`` kept ``block``."""
        most = 0.0
        for limit, costs in zip(self.limits, self.costs, strict=True):
            now = costs[layer]
            costs[layer] = now if block is None else limit.costs.block(layer, block)
            most = max(most, (limit.costs.fixed + sum(costs)) / limit.most)
            costs[layer] = now
        return most

    def down(self, families: Sequence[str]) -> None:
        """Removes bundles, least importance per cost first, then halves, until every limit holds."""
        for _, name, segment, place in sorted(c for c in self._bundles(True) if c[1] in families):
            if self.used() <= 1.0:
                return
            layer = self._layer(name, segment)
            if not self._runs(name, segment):
                continue
            if name == "v" and sum(self.kept["v"][segment]) == 1:
                if self.state.families["v"].some[segment]:
                    continue
                block = self._without_head(layer, segment)
                for part in ("qk", "v"):
                    self.kept[part][segment] = [False] * len(self.kept[part][segment])
            else:
                block = self._changed(layer, name, -self.units(name))
                self.kept[name][segment][place] = False
            self._keep(layer, block)
        held = self.state.held()
        for half in self.state.theta.flatten().argsort(stable=True).tolist():
            layer, which = divmod(half, 2)
            if self.used() <= 1.0:
                return
            if not held[layer, which]:
                self.running[layer][which] = False
                self._keep(layer, self.blocks[layer]._replace(**{("attn", "mlp")[which]: 0}))
        for limit, costs in zip(self.limits, self.costs, strict=True):
            if (cost := limit.costs.fixed + sum(costs)) > limit.most:
                raise ValueError(
                    f"budget: {limit.most:.8g} {limit.metric} cannot be met; a model with every block "
                    f"skipped{', but for what no gradient reached,' if held.any() else ''} costs {cost:.8g}"
                )

    def up(self) -> bool:
        """Puts back the most important removed bundles that fit, in kept halves and heads; whether any
        did.
        """
        full, added = set(), False
        for _, name, segment, place in sorted(self._bundles(False), reverse=True):
            layer = self._layer(name, segment)
            if (name, layer) in full or not self._runs(name, segment):
                continue
            block = self._changed(layer, name, self.units(name))
            if self.used(layer, block) > 1.0:
                full.add((name, layer))
                continue
            self.kept[name][segment][place] = added = True
            self._keep(layer, block)
        return added

    def _bundles(self, kept: bool) -> list[Bundle]:
        found: list[Bundle] = []
        for name, ratio in self.ratio.items():
            mask = torch.tensor(self.kept[name], device=ratio.device) == kept
            mask &= self.state.families[name].free()[:, None] & ~self.gone[name]
            found += zip(ratio[mask].tolist(), repeat(name), *mask.nonzero().T.tolist(), strict=False)
        return found

    def _layer(self, name: str, segment: int) -> int:
        return segment if name == "neuron" else segment // self.heads

    def _runs(self, name: str, segment: int) -> bool:
        """Whether a kept group there is computed: its half runs, its head has v dims."""
        if not self.running[self._layer(name, segment)][name == "neuron"]:
            return False
        return name == "neuron" or any(self.kept["v"][segment])

    def _changed(self, layer: int, name: str, by: int) -> BlockCounts:
        block = self.blocks[layer]
        return block._replace(**{name: getattr(block, name) + by})

    def _without_head(self, layer: int, segment: int) -> BlockCounts:
        qk, v = (self.units(name) * sum(self.kept[name][segment]) for name in ("qk", "v"))
        block = self.blocks[layer]
        return block._replace(heads=block.heads - 1, qk=block.qk - qk, v=block.v - v)

    def _keep(self, layer: int, block: BlockCounts) -> None:
        self.blocks[layer] = block
        for limit, costs in zip(self.limits, self.costs, strict=True):
            costs[layer] = limit.costs.block(layer, block)

"""Ties groups to weights. A = H * K; all layers go through one ``group_scores`` or ``prox_shrink`` call.

What a group is, so that skipping it at exact zero is lossless: neuron = fc1 row and bias (of value and gate),
fc2 column; v dim = v row and bias, projection column; q/k dim = q row, k row and both biases. A head is
removed with its last v dim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from uvc_kernels import group_scores, prox_shrink

from uvc.layers import blocks_of, families_of
from uvc.solver.rows import add_up, held, is_spread, local, spread_by
from uvc.solver.state import FAMILIES, Factors, Geometry, Masks, sent

KEPT_PLACES = 64  # of sets of parts that have gradients
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class _Part(NamedTuple):
    """A slice of a parameter: its rows (dim 0) or columns (dim 1) are groups of one family and layer.

    gates: whether a gate on the group sits here: each has one side with them.
    """

    family: str
    parameter: nn.Parameter
    start: int
    size: int
    dim: int
    gates: bool
    layer: int

    @property
    def units(self) -> slice:
        """Those of its groups that this process holds a part of."""
        if spread_by(self.parameter) != self.dim:
            return slice(0, self.size)
        first, last = (min(max(row - self.start, 0), self.size) for row in held(self.parameter))
        return slice(first, last)

    def of(self, tensor: Tensor) -> Tensor:
        """What this process holds of the slice, of a tensor like the parameter."""
        if spread_by(self.parameter) != self.dim:
            return local(tensor).narrow(self.dim, self.start, self.size)
        units, rows = self.units, local(tensor)
        start = min(max(self.start + units.start - held(self.parameter)[0], 0), rows.shape[self.dim])
        return rows.narrow(self.dim, start, units.stop - units.start)


def kind_of_pairs(pairs: Tensor | None) -> str:
    """Which q/k dims of a head go together, [K / 2, 2], as `Geometry` has it."""
    return "" if pairs is None else "neighbours" if pairs[0, 1] == 1 else "halves"


class Groups:
    """All groups of a converted model.

    Args:
        model: result of ``uvc.convert``. ValueError where q/k dims of blocks go together in several ways.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks_of(model)
        sizes = [(b.attn.num_heads, b.attn.head_dim, b.mlp.neurons) for b in self.blocks]
        pairs = {kind_of_pairs(block.attn.pairs()) for block in self.blocks}
        if len(pairs) > 1 or (pairs == {"halves"} and len({K for _, K, _ in sizes}) > 1):
            raise ValueError(
                "model: blocks differ in which of their q/k dims go together; a search knows one way alone"
            )
        self.geometry = Geometry.of(sizes, pairs.pop())
        layers = [(i, half) for i, block in enumerate(self.blocks) for half in (block.attn, block.mlp)]
        self.parts = [_Part(*part, layer) for layer, half in layers for part in half.parts()]
        self.gated = [part for part in self.parts if part.gates]
        self._places: dict[tuple[int, ...], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are. The solver is on the CPU."""
        return self.parts[0].parameter.device

    def norms(self) -> dict[str, Tensor]:
        """Squared joint norm of every group, [S, G] per family, float32, on the CPU."""
        return here(self.norms_there())

    def first_order(self) -> dict[str, Tensor]:
        """`first_order_there`, on the CPU."""
        return here(self.first_order_there())

    def norms_there(self) -> dict[str, Tensor]:
        """`norms`, where the weights are."""
        weights = [part.of(part.parameter.detach()) for part in self.parts]
        return self._families(self.parts, weights, weights)

    def first_order_there(self) -> dict[str, Tensor]:
        """w . dloss/dw over each group = dloss/dgate of a gate of 1 on it, where the weights are; zero in
        halves that no gradient reached.
        """
        parts = [part for part in self.gated if part.parameter.grad is not None]
        weights = [part.of(part.parameter.detach()) for part in parts]
        return self._families(parts, weights, [part.of(part.parameter.grad) for part in parts])

    def fixed(self) -> dict[str, Tensor]:
        """bool [S] per family: the layer does not offer to leave out the segment's groups."""
        offered = [families_of(block.attn, block.mlp) for block in self.blocks]
        units = {"qk": [f.qk for f in offered], "v": [f.v or self.whole_heads for f in offered]}
        units["neuron"] = [f.neurons for f in offered]
        places = {(n, layer) for n, all_ in units.items() for layer, unit in enumerate(all_) if not unit}
        return {name: ~free for name, free in self._segments_outside(places).items()}

    @property
    def whole_heads(self) -> bool:
        """Whether all v dims of a head go at once: every layer offers heads, but none of their dims."""
        offered = [families_of(block.attn, block.mlp) for block in self.blocks]
        alike = len({block.attn.head_dim for block in self.blocks}) == 1
        return alike and all(f.heads and not f.v for f in offered)

    def some(self) -> Tensor:
        """bool [S] of v dims: a head that must stay keeps one of them, if its half runs."""
        offered = [families_of(block.attn, block.mlp) for block in self.blocks]
        return ~self._segments_outside({("v", i) for i, f in enumerate(offered) if not f.heads})["v"]

    def trainable(self) -> dict[str, Tensor]:
        """bool [S] per family: no parameter of the segment's groups is frozen."""
        frozen = {(part.family, part.layer) for part in self.parts if not part.parameter.requires_grad}
        return self._segments_outside(frozen)

    def reached(self) -> dict[str, Tensor]:
        """bool [S] per family: the segment's gates have a gradient."""
        return self._segments_outside(self.without_gradient())

    def without_gradient(self) -> set[tuple[str, int]]:
        """Families and layers whose gates have no gradient."""
        return {(part.family, part.layer) for part in self.gated if part.parameter.grad is None}

    def waiting(self) -> set[tuple[str, int]]:
        """Families and layers that are trained: each waits for its first gradient."""
        frozen = {(part.family, part.layer) for part in self.parts if not part.parameter.requires_grad}
        return {(part.family, part.layer) for part in self.gated} - frozen

    def shrink(self, factors: Factors) -> None:
        """Multiplies every group's weights by its factor, in place."""
        self._scale(self.parts, [part.parameter for part in self.parts], factors)

    def clear(self, dead: Factors, optimizer: torch.optim.Optimizer) -> None:
        """Sets dead groups (True) to zero in the weights and in every moment the optimiser keeps for them.

        A warm moment would revive a group that the forward pass already skips.
        """
        keep = Factors(*((~mask).float() for mask in dead))
        self.shrink(keep)
        for name in MOMENTS:
            pairs = [(part, optimizer.state.get(part.parameter, {}).get(name)) for part in self.parts]
            pairs = [pair for pair in pairs if pair[1] is not None]  # none of a frozen parameter
            if pairs:
                self._scale(*zip(*pairs, strict=True), keep)

    def apply(self, masks: Masks) -> None:
        """Skips on the fly what ``masks`` leave out, groups and halves."""
        own = self.geometry.own
        for layer, (block, *rows, _) in enumerate(zip(self.blocks, *masks, strict=True)):
            qk, v, neuron = (own(name, layer, row) for name, row in zip(FAMILIES, rows, strict=True))
            dense = bool(qk.all() and v.all())
            block.attn.set_kept(None if dense else qk, None if dense else v)
            block.mlp.set_kept(None if neuron.all() else neuron)
        self.skip(masks.running)

    def skip(self, running: Tensor) -> None:
        """Skips the halves that do not run, bool [L, 2], and removes all gates."""
        for block, (attn, mlp) in zip(self.blocks, running.tolist(), strict=True):
            block.set_gates(None, None)
            block.set_skip(not attn, not mlp)

    def _segments_outside(self, places: set[tuple[str, int]]) -> dict[str, Tensor]:
        """bool [S] per family: False for the segments of these families and layers."""
        found = {}
        for name in FAMILIES:
            rows = [(name, layer) not in places for layer in range(self.geometry.layers)]
            times = self.geometry.segments(name)[0] // self.geometry.layers
            found[name] = torch.tensor(rows, device="cpu").repeat_interleave(times)
        return found

    def _families(self, parts: list[_Part], a: list[Tensor], b: list[Tensor]) -> dict[str, Tensor]:
        scores, geo = group_scores(a, b, [part.dim for part in parts]), self.geometry
        spread = bool(parts) and is_spread(parts[0].parameter)
        if spread:
            scores = scores.cpu()
        # One entry more, of zero, for what no part has; the sides of a group are added in the order of parts.
        sides = torch.cat([scores.new_zeros(1), scores])[self._places_of(parts).to(scores.device)]
        sums = sides[0]
        for side in sides[1:]:
            sums = sums + side
        shapes = [geo.shape(name) for name in FAMILIES]
        each = dict(zip(FAMILIES, sums.split([math.prod(shape) for shape in shapes]), strict=True))
        if spread:
            for values in each.values():
                add_up(parts[0].parameter, values)
        pairs = zip(each.items(), shapes, strict=True)
        sums = {name: geo.gathered(name, values.view(shape)) for (name, values), shape in pairs}
        return {name: values.to(self.device) for name, values in sums.items()} if spread else sums

    def _places_of(self, parts: list[_Part]) -> Tensor:
        """int64 [sides, groups of all families]: where in the scores of these parts each side of a group
        stands, after a first entry that stands for none.
        """
        key = tuple(map(id, parts))
        if (found := self._places.get(key)) is not None:
            return found
        geo, seen, sides, start = self.geometry, Counter(), [], 1
        for part in parts:
            side = seen[part.family, part.layer]
            seen[part.family, part.layer] += 1
            if side == len(sides):
                sizes = {n: [geo.size(n, i) for i in range(geo.layers)] for n in FAMILIES}
                none = {
                    n: [torch.zeros(size, dtype=torch.int64, device="cpu") for size in all_]
                    for n, all_ in sizes.items()
                }
                sides.append(none)
            units = part.units
            size = units.stop - units.start
            sides[side][part.family][part.layer][units] = torch.arange(start, start + size, device="cpu")
            start += size
        if not sides:
            sizes = sum(math.prod(geo.shape(name)) for name in FAMILIES)
            return torch.zeros(1, sizes, dtype=torch.int64, device="cpu")
        places = torch.stack(
            [torch.cat([geo.stacked(n, rows[n]).flatten() for n in FAMILIES]) for rows in sides]
        )
        if len(self._places) == KEPT_PLACES:
            self._places.clear()
        # sent once: while the same halves have gradients, nothing is copied
        self._places[key] = places if is_spread(parts[0].parameter) else sent(places, self.device)
        return self._places[key]

    def _scale(self, parts: Sequence[_Part], tensors: Sequence[Tensor], factors: Factors) -> None:
        geo = self.geometry
        rows = {
            n: [geo.own(n, i, row).flatten() for i, row in enumerate(t)] for n, t in factors._asdict().items()
        }
        flat = torch.cat([rows[part.family][part.layer][part.units] for part in parts])
        slices = [part.of(tensor.detach()) for part, tensor in zip(parts, tensors, strict=True)]
        whole = [t.contiguous() for t in slices]  # columns among others are not
        prox_shrink(whole, sent(flat, self.device), [part.dim for part in parts])
        for mine, scaled in zip(slices, whole, strict=True):
            if scaled is not mine:
                mine.copy_(scaled)


def here(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one dtype on the CPU, by one copy."""
    flat = torch.cat([t.flatten() for t in tensors.values()]).cpu()
    parts = flat.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, tensors.items(), strict=True)}

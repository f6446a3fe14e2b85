"""Ties groups to weights. A = H * K; all layers go through one ``group_scores`` or ``prox_shrink`` call.

What a group is, so that skipping it at exact zero is lossless: neuron = fc1 row and bias (of value and gate),
fc2 column; v dim = v row and bias, projection column; q/k dim = q row, k row and both biases; head = all its
v dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from uvc_kernels import group_scores, prox_shrink

from uvc.solver.state import Factors, Geometry


class _Part(NamedTuple):
    """A slice of a parameter: its rows (dim 0) or columns (dim 1) are groups of one family and layer."""

    parameter: nn.Parameter
    start: int
    size: int
    dim: int
    family: str
    layer: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.size)


class Groups:
    """All groups of a converted model.

    Args:
        model: result of ``uvc.convert``; all blocks of equal heads, head dim and hidden size (ValueError
        otherwise).
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = list(model.blocks)
        sizes = {(b.attn.num_heads, b.attn.head_dim, b.mlp.fc2.in_features) for b in self.blocks}
        if len(sizes) != 1:
            raise ValueError(
                f"model: blocks differ in (heads, head dim, neurons): {sorted(sizes)}; they must be equal"
            )
        self.geometry = Geometry(len(self.blocks), *sizes.pop())
        self.parts = [part for layer, block in enumerate(self.blocks) for part in _parts(layer, block)]
        # A gate sits on one side of its group: on q, before the projection (v dims), before fc2 (neurons).
        self.gated = [p for p in self.parts if p.dim == 1 or (p.family == "qk" and p.start == 0)]

    def norms(self) -> dict[str, Tensor]:
        """Squared joint norm of every group, [S, G] per family, float32."""
        weights = [part.of(part.parameter.detach()) for part in self.parts]
        return self._families(self.parts, weights, weights)

    def first_order(self) -> dict[str, Tensor]:
        """w . dloss/dw over each group = dloss/dgate of a gate of 1 on it; zero in halves that no gradient
        reached.
        """
        parts = [part for part in self.gated if part.parameter.grad is not None]
        weights = [part.of(part.parameter.detach()) for part in parts]
        return self._families(parts, weights, [part.of(part.parameter.grad) for part in parts])

    def shrink(self, factors: Factors) -> None:
        """Multiplies every group's weights by its factor, in place."""
        self._scale([part.of(part.parameter.detach()) for part in self.parts], factors)

    def clear(self, dead: Factors, optimizer: torch.optim.Optimizer) -> None:
        """Sets dead groups (True) to zero in the weights and in every moment the optimiser keeps for them.

        A warm moment would revive a group that the forward pass already skips.
        """
        keep = Factors(*((~mask).float() for mask in dead))
        self.shrink(keep)
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            moments = [optimizer.state.get(part.parameter, {}).get(name) for part in self.parts]
            if all(moment is not None for moment in moments):
                self._scale([part.of(moment) for part, moment in zip(self.parts, moments, strict=True)], keep)

    def apply(self, alive: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Skips on the fly what is not alive (masks as from ``State.alive``)."""
        for block, qk, v, neuron, _ in zip(self.blocks, *alive, strict=True):
            dense = bool(qk.all() and v.all())
            block.attn.set_kept(None if dense else qk, None if dense else v)
            block.mlp.set_kept(None if neuron.all() else neuron)

    def _families(self, parts: list[_Part], a: list[Tensor], b: list[Tensor]) -> dict[str, Tensor]:
        geo = self.geometry
        scores = group_scores(a, b, [part.dim for part in parts])
        attn_dims = geo.heads * geo.head_dim
        sums = {
            name: scores.new_zeros(geo.layers, size)
            for name, size in (("qk", attn_dims), ("v", attn_dims), ("neuron", geo.hidden))
        }
        for part, values in zip(parts, scores.split([part.size for part in parts]), strict=True):
            sums[part.family][part.layer] += values
        out = {name: values.view(geo.segments(name)) for name, values in sums.items()}
        return {**out, "head": out["v"].sum(1).view(geo.layers, geo.heads)}

    def _scale(self, tensors: list[Tensor], factors: Factors) -> None:
        rows = {name: factor.flatten(1) for name, factor in factors._asdict().items()}
        flat = torch.cat([rows[part.family][part.layer] for part in self.parts])
        prox_shrink(tensors, flat, [part.dim for part in self.parts])


def _parts(layer: int, block: nn.Module) -> list[_Part]:
    attn, mlp = block.attn, block.mlp
    dims, hidden = attn.num_heads * attn.head_dim, mlp.fc2.in_features
    parts = [
        _Part(attn.proj.weight, 0, dims, 1, "v", layer),
        _Part(mlp.fc2.weight, 0, hidden, 1, "neuron", layer),
    ]
    for parameter in (attn.qkv.weight, attn.qkv.bias):
        if parameter is not None:
            parts += [
                _Part(parameter, i * dims, dims, 0, name, layer) for i, name in enumerate(("qk", "qk", "v"))
            ]
    return parts + [_Part(rows, start, hidden, 0, "neuron", layer) for rows, start in mlp.neuron_rows()]

"""Several budgets in one model: a search that goes from the largest to the smallest, and steps that train
them together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.elastic import structures_from_data, structures_to_data
from uvc.layers import blocks_of
from uvc.solver.param_groups import Groups
from uvc.solver.pruner import Pruner
from uvc.solver.search import Search
from uvc.solver.state import Factors
from uvc.structure import Structure, apply_structure, structure_of

OWN = "elastic/"  # before the names of what is not the running search's


class NestedSearch(Pruner):
    """A search for each budget after that of the next larger one, each in an equal share of the steps.

    What is gone at a budget stays gone at smaller ones. Weights that a smaller budget does not keep are put
    back by ``harden`` as they were at the last budget that did.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Mapping[float, Sequence[Limit]],
        steps: int,
        config: SolverConfig | None = None,
        seed: int = 0,
    ) -> None:
        """stages: the limits of each budget, largest first."""
        self.stages = dict(stages)
        super().__init__(model, next(iter(self.stages.values())), steps, config, seed)
        self.seed, self.found, self.weights = seed, [], []
        self.ends = [round(self.steps * (i + 1) / len(self.stages)) for i in range(len(self.stages))]
        self._begin()

    def _begin(self) -> None:
        """The search for the next budget, from the structure that the model has."""
        stage = len(self.found)
        steps = self.ends[stage] - (self.ends[stage - 1] if stage else 0)
        self.limits = tuple(list(self.stages.values())[stage])
        self.inner = Search(self.model, self.limits, steps, self.config, self.seed)

    def before(self) -> None:
        self.inner.before()

    def evidence(self) -> list[Tensor]:
        return self.inner.evidence()

    def observe(self, scale: float = 1.0) -> None:
        self.inner.observe(scale)

    def forget(self) -> None:
        self.inner.forget()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner.step(optimizer)
        self.count += 1
        if self.count in self.ends[:-1]:
            self._end()
            self._begin()

    def _end(self) -> None:
        """Keeps the structure at this budget, and the weights with it."""
        self.inner.harden()
        structure = structure_of(self.model)
        if self.found:
            # An empty half may have come back, of which only its bias would run.
            pairs = zip(structure.blocks, self.found[-1].blocks, strict=True)
            blocks = [replace(b, attn=b.attn and a.attn, mlp=b.mlp and a.mlp) for b, a in pairs]
            structure = Structure(tuple(blocks))
            apply_structure(self.model, structure)
        self.found.append(structure)
        named = self._weights() if len(self.found) < len(self.stages) else {}
        self.weights.append({name: weight.detach().clone() for name, weight in named.items()})

    def harden(self) -> None:
        """Ends the search; the model gets the structure of the largest budget, and the weights for it."""
        self._end()
        self._put_back()
        apply_structure(self.model, self.found[0])

    def structures(self) -> dict[float, Structure]:
        """What was found, by budget; after ``harden`` all of it."""
        return dict(zip(self.stages, self.found, strict=False))

    @torch.no_grad()
    def _put_back(self) -> None:
        """Weights that a smaller budget does not keep, as they were at the last one that did."""
        named = self._weights()
        groups, last = Groups(self.model), {name: weight.clone() for name, weight in named.items()}
        for structure, before in zip(self.found[1:][::-1], self.weights[:-1][::-1], strict=True):
            apply_structure(self.model, structure)
            for weight in named.values():
                weight.fill_(1.0)
            groups.shrink(Factors(*(mask.float() for mask in self._running())))
            for name, weight in named.items():
                last[name] = torch.where(weight == 0, before[name], last[name])
        for name, weight in named.items():
            weight.copy_(last[name])

    def _weights(self) -> dict[str, nn.Parameter]:
        """The parameters that groups have a part in, by name."""
        own = {id(part.parameter) for part in self.inner.groups.parts}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    def _running(self) -> Factors:
        """The groups that the model computes."""
        blocks, stacked = blocks_of(self.model), self.inner.groups.geometry.stacked
        v = stacked("v", [b.attn.kept_v & (not b.skip_attn) for b in blocks])
        qk = stacked("qk", [b.attn.kept_qk for b in blocks]) & v.any(-1, keepdim=True)
        device = next(self.model.parameters()).device
        neuron = stacked("neuron", [b.mlp.kept_neurons & (not b.skip_mlp) for b in blocks])
        return Factors(qk.to(device), v.to(device), neuron.to(device))

    def metrics(self) -> dict[str, float]:
        return self.inner.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        own = {"count": torch.tensor(self.count), "structures": to_bytes(self.structures())}
        for stage, weights in enumerate(self.weights):
            own |= {f"weights/{stage}/{name}": weight for name, weight in weights.items()}
        return {**self.inner.state_dict(), **{OWN + name: value for name, value in own.items()}}

    def facts(self) -> dict[str, Any]:
        """Without the weights that are kept aside, which are equal if those of the model were."""
        return {**self.inner.facts(), "budgets that are done": len(self.found)}

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        own = {name.removeprefix(OWN): t for name, t in flat.items() if name.startswith(OWN)}
        self.count, self.found = int(own["count"]), list(from_bytes(own["structures"]).values())
        device, self.weights = next(self.model.parameters()).device, []
        for stage in range(len(self.found)):
            start = f"weights/{stage}/"
            named = {name.removeprefix(start): t for name, t in own.items() if name.startswith(start)}
            self.weights.append({name: weight.to(device) for name, weight in named.items()})
        if self.found:
            apply_structure(self.model, self.found[-1])
        self._begin()
        self.inner.load_state_dict({name: t for name, t in flat.items() if not name.startswith(OWN)})


class Joint(Pruner):
    """Each step trains the smallest budget, and in turn one of the others, on the same batch.

    Of equal compute this makes more than steps of three budgets, whose larger ones the smallest follows too
    seldom. Between steps the model has the largest.
    """

    def __init__(self, model: nn.Module, structures: Mapping[float, Structure]) -> None:
        super().__init__(model)
        self.structures = dict(structures)
        # What blocks derive from a structure is derived once: a step switches three times.
        self.largest, *others = [self._selections(structure) for structure in self.structures.values()]
        smallest = others.pop()
        self.pairs = [(smallest, one) for one in (*others, self.largest)]
        self._select(self.largest)

    @property
    def passes(self) -> int:
        return 2

    def _selections(self, structure: Structure) -> list[Any]:
        """What each block keeps; the model has this structure from here on."""
        apply_structure(self.model, structure)
        return [block.selection() for block in blocks_of(self.model)]

    def _select(self, selections: list[Any]) -> None:
        for block, selection in zip(blocks_of(self.model), selections, strict=True):
            block.select(selection)

    def turn(self, number: int) -> None:
        self._select(self.pairs[self.count % len(self.pairs)][number])

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.count += 1
        self._select(self.largest)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "structures": to_bytes(self.structures)}

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        self.count = int(flat["count"])


def to_bytes(structures: Mapping[float, Structure]) -> Tensor:
    """Structures by budget as a tensor, for a checkpoint."""
    return torch.tensor(list(json.dumps(structures_to_data(structures)).encode()), dtype=torch.uint8)


def from_bytes(tensor: Tensor) -> dict[float, Structure]:
    """Inverse of `to_bytes`."""
    data = json.loads(bytes(tensor.tolist()))
    return structures_from_data(data) if data else {}

"""What the paper's published code does, kept as one named ablation (``SolverConfig.method = "published"``).

Per step, as the code was read (VITA-Group/UVC): soft Gumbel gates of temperature 0.5 on whole blocks; the
prox w / (1 + 2 lr y) on the ceil(s) smallest heads and neurons and the ceil(r) smallest dims; s and r in
counts, by SGD 0.02 on y * next norm + z dR/ds, clipped to an infinity norm of 1; gates by their mean
gradient over 50 steps, SGD 0.1 with momentum 0.9; y, p += 1e-4 times the norm left, never unwinding; z += R
- budget. Norms are those of the columns of the output projection and of fc2 alone, so q and k are never
chosen. The gradient of the cost vanishes while R is further than ``CLIP`` from the budget, as a constraint
clipped by value does.

Two departures, both so that its result can be compared: a gate multiplies both branches of a block rather
than their sum, and where the search ends above the budget, as it usually does, greedy rounding ends it, by
its own norms. Symbols as in ``uvc.solver``, with s, r in counts, and with heads as a family of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import Counts, total
from uvc.layers import NAMES, convert, families, named_blocks, sizes_of
from uvc.solver.param_groups import Groups
from uvc.solver.pruner import Pruner, method
from uvc.solver.rounding import round_to_budget
from uvc.solver.state import Factors, Family, State, smallest

TEMPERATURE, COUNT_RATE, DUAL_RATE, BUDGET_RATE = 0.5, 0.02, 1e-4, 1.0
GATE_RATE, GATE_MOMENTUM, GATE_COST, GATE_EVERY = 0.1, 0.9, 5e-4, 50
CLIP = 0.5
CHOSEN = ("head", "v", "neuron")
KEPT = ("z", "gate", "gate_mean", "velocity")  # in a checkpoint


@method("published")
class PublishedSearch(Pruner):
    """The published method; of the settings it takes none."""

    def __init__(
        self,
        model: nn.Module,
        limits: Sequence[Limit],
        steps: int,
        config: SolverConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(convert(model), limits, steps, config, seed)
        self.groups = Groups(model)
        _, self.prices, self.dense_cost, self.budget = self.limits[0]
        geo = self.groups.geometry
        sizes = {"head": (geo.layers, geo.heads)} | {name: geo.segments(name) for name in CHOSEN[1:]}
        self.families = {name: Family.new(*size, "cpu") for name, size in sizes.items()}
        for family in self.families.values():
            family.y.zero_()  # here s holds counts, and y starts at 0
        self.z = torch.zeros((), device="cpu")
        # Logits of skipping and running.
        self.gate = torch.tensor([0.0, 3.0], device="cpu").repeat(geo.layers, 1)
        self.gate_mean, self.velocity = torch.zeros_like(self.gate), torch.zeros_like(self.gate)
        self.generator = torch.Generator().manual_seed(seed)

    @staticmethod
    def check(model: nn.Module, limits: Sequence[Limit], config: SolverConfig) -> None:
        """It knows one budget, linear in the counts, and no layer that stays as it is."""
        metrics = [limit.metric for limit in limits]
        if metrics not in (["macs"], ["params"]):
            raise ValueError(
                f"budget: it is in {' and '.join(metrics)}; the published method takes one, in macs or params"
            )
        sizes_of(model).of_all("method published")
        for i, offered in enumerate(families(model)):
            if tied := [name for name in ("heads", "qk", "v", "neurons") if offered[name] != 1]:
                raise ValueError(
                    f"blocks.{i}: its {NAMES[tied[0]]} do not go one by one, and the published method prunes "
                    'every family; use method "uvc"'
                )
        blocks = named_blocks(model).items()
        named = [(f"{name}.{n}", p) for name, block in blocks for n, p in block.named_parameters()]
        if frozen := [name for name, parameter in named if not parameter.requires_grad]:
            raise ValueError(
                f"{frozen[0]}: it is frozen (requires_grad False); the published method prunes every "
                'block alike; use method "uvc"'
            )

    def before(self) -> None:
        """Draws soft gates, for every block and step anew."""
        noise = -torch.rand(self.gate.shape, generator=self.generator).clamp_min(1e-9).log()
        logits = self.gate.detach().clone().requires_grad_(True)
        self._logits = logits
        self._sample = ((logits - noise.log().to(logits)) / TEMPERATURE).softmax(-1)
        # A leaf, as a batch may take several backward passes.
        self._gate = self._sample[:, 1].detach().to(self.groups.device).requires_grad_(True)
        for block, gate in zip(self.groups.blocks, self._gate.unbind(), strict=True):
            block.set_gates(gate, gate)

    def evidence(self) -> list[Tensor]:
        """The gradients of the gates."""
        return [self._gate.grad]

    def observe(self, scale: float = 1.0) -> None:
        """Adds the task's gradient of the gates and the cost's, whose gates are the same noisy ones."""
        (gradient,) = torch.autograd.grad(self._sample[:, 1], self._logits, self._gate.grad.cpu() / scale)
        logits = self.gate.detach().clone().requires_grad_(True)
        cost = self._cost(logits.softmax(-1)[:, 1])
        gradient = gradient + float(self.z) * GATE_COST * torch.autograd.grad(cost, logits)[0]
        self.gate_mean += gradient / GATE_EVERY

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Prox, counts, gates, duals, in the order of the code."""
        self.count += 1
        for block in self.groups.blocks:
            block.set_gates(None, None)
        families, rate = self.families, optimizer.param_groups[0]["lr"]
        norms = self._norms()
        self.groups.shrink(self._factors(norms, rate))
        cost_gradients = self._count_gradients()
        for name in CHOSEN:
            family = families[name]
            order = norms[name].sort(dim=1).values
            following = order.gather(1, family.s.ceil().long()[:, None].clamp(max=order.shape[1] - 1))[:, 0]
            gradient = family.y * following + self.z * cost_gradients[name]
            gradient = gradient / gradient.abs().max().clamp_min(1.0)
            family.s.sub_(COUNT_RATE * gradient).clamp_(0, order.shape[1] - 1)
        if self.count % GATE_EVERY == 0:
            self.velocity.mul_(GATE_MOMENTUM).add_(self.gate_mean)
            self.gate -= GATE_RATE * self.velocity
            self.gate_mean.zero_()
        norms = self._norms()
        for name in CHOSEN:
            family = families[name]
            family.y += DUAL_RATE * (norms[name] * smallest(norms[name], family.s.ceil())).sum(1)
        ratio = float(self._cost(self.gate.softmax(-1)[:, 1])) / self.dense_cost
        self.z.add_(BUDGET_RATE * (ratio - self.budget)).clamp_(min=0.0)

    def harden(self) -> None:
        """Hard gates and masks; then rounding, where they cost more than the budget."""
        norms, geo = self._norms(), self.groups.geometry
        state = State.new(geo, device=self.gate.device)
        state.hard = True
        heads = smallest(norms["head"], self.families["head"].s.ceil()).view(-1, 1)
        for name in CHOSEN[1:]:
            state.families[name].importance.copy_(norms[name])
            state.families[name].dead.copy_(smallest(norms[name], self.families[name].s.ceil()))
        state.families["v"].dead |= heads
        state.families["qk"].dead |= heads
        state.theta.copy_(torch.where(self.gate[:, 1] > self.gate[:, 0], 6.0, -6.0)[:, None].expand(-1, 2))
        self.groups.apply(round_to_budget(state, self.limits, CHOSEN[1:]))

    def metrics(self) -> dict[str, float]:
        """Scalars for the log."""
        out = {"z": float(self.z), "gates": float(self.gate.softmax(-1)[:, 1].mean())}
        out["soft_cost"] = float(self._cost(self.gate.softmax(-1)[:, 1])) / self.dense_cost
        for name in CHOSEN:
            family = self.families[name]
            out[f"removed_{name}"] = float(family.s.mean()) / family.dead.shape[1]
            out[f"y_{name}"] = float(family.y.mean())
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        counts = {f"{name}.{key}": getattr(self.families[name], key) for name in CHOSEN for key in "sy"}
        return {
            **counts,
            **{name: getattr(self, name) for name in KEPT},
            "count": torch.tensor(self.count),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``."""
        for name in CHOSEN:
            self.families[name].s.copy_(flat[f"{name}.s"])
            self.families[name].y.copy_(flat[f"{name}.y"])
        for name in KEPT:
            getattr(self, name).copy_(flat[name])
        self.count = int(flat["count"])
        self.generator.set_state(flat["generator"])

    def _norms(self) -> dict[str, Tensor]:
        """Squared norms of columns of the output projection and of fc2, [S, G] per family."""
        geo, blocks = self.groups.geometry, self.groups.blocks
        v = torch.stack([block.attn.proj.weight.detach().square().sum(0) for block in blocks])
        neuron = torch.stack([block.mlp.fc2.weight.detach().square().sum(0) for block in blocks])
        v = v.view(geo.layers * geo.heads, geo.head_dim)
        return {"v": v, "head": v.sum(1).view(geo.layers, geo.heads), "neuron": neuron}

    def _factors(self, norms: dict[str, Tensor], rate: float) -> Factors:
        """Prox factors of the chosen groups; a head shrinks through its v dims, one after the other."""
        geo, factor = self.groups.geometry, {}
        for name in CHOSEN:
            family = self.families[name]
            shrink = 1.0 / (1.0 + 2.0 * rate * family.y)
            factor[name] = torch.where(smallest(norms[name], family.s.ceil()), shrink[:, None], 1.0)
        shape = (geo.layers, geo.heads, geo.head_dim)
        v = factor["v"].view(shape) * factor["head"][:, :, None]
        return Factors(torch.ones(shape, device=v.device), v, factor["neuron"])

    def _cost(self, gates: Tensor, s: dict[str, Tensor] | None = None) -> Tensor:
        """R in the unit of the prices, with counts as they are; a removed head takes its q/k dims along."""
        geo = self.groups.geometry
        s = s or {name: self.families[name].s for name in CHOSEN}
        heads = geo.heads - s["head"]
        dims = (geo.head_dim - s["v"]).view(geo.layers, geo.heads).mean(1)
        counts = Counts(gates, gates, heads * geo.head_dim, heads * dims, geo.hidden - s["neuron"], heads)
        return total(self.prices, counts)

    def _count_gradients(self) -> dict[str, Tensor]:
        """dR/ds, R a fraction of the dense cost; zero while the constraint is clipped."""
        s = {name: self.families[name].s.clone().requires_grad_(True) for name in CHOSEN}
        ratio = self._cost(self.gate.softmax(-1)[:, 1], s) / self.dense_cost
        constraint = (ratio - self.budget).clamp(-CLIP, CLIP)
        return dict(zip(CHOSEN, torch.autograd.grad(constraint, list(s.values())), strict=True))

"""The primal-dual search: the solver beside a training loop.

The budget goes from 1 to its value over part of the search (``SolverConfig.anneal``); before that only
importance is collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import Counts, total
from uvc.layers import convert, sizes_of
from uvc.solver import skip_gates
from uvc.solver.head_basis import balance_heads
from uvc.solver.objective import hard_cost, marginal, soft_cost
from uvc.solver.param_groups import Groups, here
from uvc.solver.pruner import Pruner, method
from uvc.solver.rounding import round_to_budget
from uvc.solver.state import ALWAYS, Factors, Masks, State, sent
from uvc.solver.step import dual, primal, prox, snap
from uvc.solver.token_groups import check_tokens, tokens_of


@method("uvc")
class Search(Pruner):
    """Finds a structure of a model while it trains; ``seed`` is that of the skip samples.

    What is frozen, and what no gradient reaches, is left as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        limits: Sequence[Limit],
        steps: int,
        config: SolverConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(convert(model), limits, steps, config, seed)
        config, many = self.config, len(self.limits)
        # The state is the host's, where its decisions are: of a device it reads what `Groups` copies at once.
        self.groups = Groups(model)
        geometry, whole = self.groups.geometry, self.groups.whole_heads
        self.state = State.new(geometry, config.gate_init, "cpu", many, config.round_to, whole)
        if config.skip == "none":
            self.state.theta.fill_(6.0)
            self.state.hard = True
        self._continue()
        self.tokens = tokens_of(self.model, config.tokens, many)
        self.state.tokens = self.tokens.state
        self.generator = torch.Generator().manual_seed(seed)
        for name, norms in self.groups.norms().items():
            family = self.state.families[name]
            family.scale = max(family.mean(norms), 1e-30)
        # A search that follows another one goes on from what that has left.
        left = [hard_cost(self.state, limit.costs) / limit.dense for limit in self.limits]
        self._start = [
            min(max(cost, limit.budget), 1.0) for cost, limit in zip(left, self.limits, strict=True)
        ]
        self._last_targets = list(self._start)
        self._gates: tuple[Tensor, Tensor] | None = None
        # What a step has seen and the CPU does not know yet: by family, and of gates.
        self._changes: dict[str, Tensor] = {}
        self._run = torch.ones_like(self.state.theta, dtype=torch.bool)  # halves that ran in this step

    @staticmethod
    def check(model: nn.Module, limits: Sequence[Limit], config: SolverConfig) -> None:
        """ValueError for tokens that cannot be dropped and a budget that frozen blocks put out of reach."""
        check_tokens(model, config.tokens, [limit.metric for limit in limits])
        check_frozen(model, limits)

    @staticmethod
    def prepare(model: nn.Module, config: SolverConfig) -> None:
        """Gives heads a basis in which their dims can compete."""
        if config.balance:
            balance_heads(model)

    def _continue(self) -> None:
        """What the model leaves out already stays out: a search can follow another one. Nothing is open
        before its first gradient.
        """
        state, blocks = self.state, self.groups.blocks
        stacked = self.groups.geometry.stacked
        v = stacked("v", [block.attn.kept_v for block in blocks])
        qk = stacked("qk", [block.attn.kept_qk for block in blocks]) & v.any(-1, keepdim=True)
        neuron = stacked("neuron", [block.mlp.kept_neurons for block in blocks])
        skipped = torch.tensor([(b.skip_attn, b.skip_mlp) for b in blocks], device="cpu")
        state.keep(Masks(qk, v, neuron, ~skipped))
        skip_gates.remove_halves(state, skipped)
        self._trainable, fixed = self.groups.trainable(), self.groups.fixed()
        self._waiting = self.groups.waiting()
        state.families["v"].some.copy_(self.groups.some())
        for name, family in state.families.items():
            family.fixed.copy_(fixed[name])
            family.gone.copy_(family.dead)
            family.open.copy_(self._trainable[name])
        state.theta.masked_fill_(state.held(), ALWAYS).masked_fill_(skipped, -6.0)
        for family in state.families.values():
            family.open.zero_()
            family.s.copy_(family.dead.to(family.s.dtype).mean(1))

    @property
    def progress(self) -> float:
        """Finished fraction of the search."""
        return self.count / self.steps

    def targets(self) -> list[float]:
        """Budgets of this moment: what there was before the annealing, the given ones after it."""
        start, end = self.config.anneal
        share = min(max((self.progress - start) / max(end - start, 1e-9), 0.0), 1.0)
        pairs = zip(self._start, self.limits, strict=True)
        return [start ** (1.0 - share) * limit.budget**share for start, limit in pairs]

    def before(self) -> None:
        """Sets the skips of the coming step: sampled ones really skip, except on gate-update steps, where
        branches get gates. What halves read of tokens is watched where all run.
        """
        update = self.count % self.config.gate_every == 0
        if (self.state.hard or update) and self.count % self.config.every == 0:
            self.tokens.watch()
        if self.state.hard:
            return
        run = self._run = skip_gates.sample(self.state, self.config.skip, self.generator)
        self._gates = None
        if not update:
            return self.groups.skip(run)
        gates = run.float().to(self.groups.device).unbind(1)
        self._gates = tuple(gate.requires_grad_() for gate in gates)
        for block, *gates in zip(self.groups.blocks, *self._gates, strict=True):
            block.set_gates(*gates)

    def _run_all(self) -> None:
        """Between steps no sampled skip or gate stays on the model: an evaluation sees all of it."""
        if not self.state.hard:
            for block in self.groups.blocks:
                block.set_gates(None, None)
                block.set_skip(False, False)

    def evidence(self) -> list[Tensor]:
        """The gradients of the gates, and what halves read of tokens."""
        for gate in self._gates or ():
            if gate.grad is None:
                gate.grad = torch.zeros_like(gate)
        return [*(gate.grad for gate in self._gates or ()), *self.tokens.evidence()]

    def observe(self, scale: float = 1.0) -> None:
        """Reads gradients: first-order importance of every group, and of the gates. `step` copies it."""
        self._changes = {}
        if self._waiting:
            self._open()
        if self._gates is not None:
            grads = [g.grad if g.grad is not None else torch.zeros_like(g) for g in self._gates]
            self._changes["gates"] = torch.stack(grads, 1) / scale
        if self.count % self.config.every == 0:
            self._rate = (1.0 - self.config.importance_decay) * self._run.to(self.state.theta.dtype)
            for name, value in self.groups.first_order_there().items():
                self._changes[name] = (value / scale).square()
        self.tokens.observe(scale, self.config.importance_decay)

    def _rates(self, name: str) -> Tensor:
        """[S, 1]: how far the importance of a family follows what a step has seen."""
        rate = self._rate[:, 1 if name == "neuron" else 0]
        return rate.repeat_interleave(len(self.state.families[name].s) // len(rate))[:, None]

    def _receive(self) -> None:
        """What the last step has seen, in one copy."""
        if not self._changes:
            return
        changes = here(self._changes)
        if (gradients := changes.pop("gates", None)) is not None:
            skip_gates.update(self.state, gradients, self.config)
        for name, change in changes.items():
            self.state.families[name].importance.lerp_(change, self._rates(name))
        self._changes = {}

    def _prox(self) -> dict[str, Tensor]:
        """Shrinks what is on its way out, where the weights are, and reads in one copy what the step has seen
        and the squared norms that are left, which are returned.

        What is least important is known there before it is here, so the same function runs there.
        """
        state, device, changes = self.state, self.groups.device, self._changes
        families = {name: family.on(device) for name, family in state.families.items()}
        for name in families.keys() & changes.keys():
            family = families[name]
            moved = torch.lerp(family.importance, changes[name], sent(self._rates(name), device))
            families[name] = replace(family, importance=moved)
        self.groups.shrink(prox(replace(state, families=families), self.config))
        found = {("norms", name): norms for name, norms in self.groups.norms_there().items()}
        found |= {name: family.importance for name, family in families.items() if name in changes}
        found |= {name: changes[name] for name in ("gates",) if name in changes}
        self._changes, found = {}, here(found)
        if "gates" in found:
            skip_gates.update(state, found["gates"], self.config)
        for name in families.keys() & found.keys():
            state.families[name].importance.copy_(found[name])
        state.check_finite()
        return {name: found["norms", name] for name in families}

    def forget(self) -> None:
        """What halves have read of tokens in this step is not finite either."""
        self.tokens.forget()

    def _open(self) -> None:
        """Segments that a gradient has reached may lose groups from here on: no gradient is no evidence."""
        reached = self.groups.reached()
        for name, family in self.state.families.items():
            family.open |= reached[name] & self._trainable[name]
        self._waiting &= self.groups.without_gradient()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One solver step on every ``config.every``-th training step: prox, primal, dual, snap."""
        config, state = self.config, self.state
        self.count += 1
        self._run_all()
        if not state.hard and self.progress >= config.gate_freeze:
            self._receive()
            self.freeze_gates(optimizer)
        if state.settled or (self.count - 1) % config.every or self.progress < config.anneal[0]:
            return self._receive()
        norms = self._prox()
        self.tokens.reprice(state, self.limits)
        primal(state, marginal(state, self.limits), config)
        targets = self.targets()
        tightened = [last - now for last, now in zip(self._last_targets, targets, strict=True)]
        dual(state, norms, self.limits, targets, tightened, config)
        self._last_targets = targets
        if snap(state, norms, self.limits, config):
            self.remove_dead(optimizer)
        if not state.settled:
            self.limits = self.tokens.step(state, self.limits)

    def freeze_gates(self, optimizer: torch.optim.Optimizer) -> None:
        """From here on a half runs always or never."""
        skip_gates.freeze(self.state, self.limits)
        self._gates = None
        self.remove_dead(optimizer)

    def remove_dead(self, optimizer: torch.optim.Optimizer) -> None:
        """Dead groups: zero in weights and optimiser, and skipped from the next step on; empty halves too."""
        if self.state.hard and self.config.skip != "none":
            skip_gates.skip_empty(self.state, self.limits)
        alive = self.state.alive()
        self.groups.clear(Factors(~alive.qk, ~alive.v, ~alive.neuron), optimizer)
        self._apply(alive)

    def harden(self) -> None:
        """Ends the search: gates hard, then greedy rounding; the model gets the final structure, at most the
        budget.
        """
        self.state.check_finite()
        if not self.state.hard:
            skip_gates.freeze(self.state, self.limits)
        self.limits = self.tokens.finish(self.state, self.limits, self.config.families)
        self._apply(round_to_budget(self.state, self.limits, self.config.families))

    def _apply(self, masks: Masks) -> None:
        """Gives the model its structure."""
        self.groups.apply(masks)
        self._run = masks.running

    def metrics(self) -> dict[str, float]:
        """Scalars for the log: costs as fractions of dense, duals, and mean removed fractions.

        Of several budgets the first has the plain names, the others end in their metric.
        """
        state, out = self.state, {}
        for m, (limit, target) in enumerate(zip(self.limits, self.targets(), strict=True)):
            end = f"_{limit.metric}" if m else ""
            out[f"target{end}"] = target
            out[f"soft_cost{end}"] = float(soft_cost(state, limit.costs)) / limit.dense
            out[f"hard_cost{end}"] = hard_cost(state, limit.costs) / limit.dense
            out[f"z{end}"] = float(state.z[m])
        out["gates"] = float(state.gates().mean())
        out |= self.tokens.metrics()
        for name, family in state.families.items():
            out[f"removed_{name}"] = family.removed_share()
            out[f"dead_{name}"] = family.mean(family.dead.float())
            out[f"y_{name}"] = float(family.y.mean())
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        return {
            **self.state.tensors(),
            "count": torch.tensor(self.count),
            "last_targets": torch.tensor(self._last_targets, dtype=torch.float64),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``; the model must already hold its weights. Skips what was skipped."""
        self.state.load_tensors(flat)
        self.count = int(flat["count"])
        self._last_targets = flat["last_targets"].tolist()
        self.generator.set_state(flat["generator"])
        self.limits = self.tokens.restore(self.limits)
        self._apply(self.state.alive())


def check_frozen(model: nn.Module, limits: Sequence[Limit]) -> None:
    """ValueError if the limits cannot be met while frozen blocks of a timm or converted model stay."""
    rows, s = [], sizes_of(model)
    for (attn, mlp), offered in zip(s.layers, s.families, strict=True):
        parts = (*attn.parts(), *mlp.parts())
        frozen = {part.family for part in parts if not part.parameter.requires_grad}
        stays, dims = "v" in frozen, attn.num_heads * attn.head_dim
        qk = dims * ("qk" in frozen or (stays and not offered.qk))
        neurons = mlp.neurons * ("neuron" in frozen)
        rows.append((stays, "neuron" in frozen, qk, dims * stays, neurons, attn.num_heads * stays))
    least = Counts(*zip(*rows, strict=True))
    for limit in limits:
        if (cost := total(limit.costs, least)) > limit.most:
            names = [str(i) for i, row in enumerate(rows) if row[0] or row[1]]
            raise ValueError(
                f"budget: {limit.budget} is below {cost / limit.dense:.4f}, the smallest {limit.metric} "
                f"budget that leaves frozen blocks alone ({', '.join(names)} have requires_grad False)"
            )

"""The search: the solver beside a training loop. Call ``before`` the forward pass, ``observe`` after
backward, ``step`` after the optimiser.

The budget goes from 1 to its value over part of the search (``SolverConfig.anneal``); before that only
importance is collected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.layers import convert
from uvc.solver import skip_gates
from uvc.solver.head_basis import balance_heads
from uvc.solver.objective import hard_cost, marginal, soft_cost, used
from uvc.solver.param_groups import Groups
from uvc.solver.pruner import Pruner, method
from uvc.solver.rounding import project_to_budget
from uvc.solver.state import Factors, Masks, State
from uvc.solver.step import dual, primal, project, prox
from uvc.solver.token_groups import Tokens, check_tokens, dearest


@method("uvc")
class Search(Pruner):
    """Finds a structure of a model while it trains; ``seed`` is that of the skip samples."""

    def __init__(
        self,
        model: nn.Module,
        limits: Sequence[Limit],
        steps: int,
        config: SolverConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(convert(model), limits, steps, config, seed)
        config = self.config
        self.groups = Groups(model)
        device = next(model.parameters()).device
        self.state = State.new(
            self.groups.geometry, config.gate_init, device, len(self.limits), config.round_to
        )
        if config.skip == "none":
            self.state.theta.fill_(6.0)
            self.state.hard = True
        self._continue()
        self.tokens = Tokens(self.model, config.tokens) if config.tokens else None
        if self.tokens is not None:
            self.state.tokens = self.tokens.state
        self.generator = torch.Generator().manual_seed(seed)
        for name, norms in self.groups.norms().items():
            self.state.families[name].scale = max(float(norms.mean()), 1e-30)
        self._last_targets = [1.0] * len(self.limits)
        self._gates: tuple[Tensor, Tensor] | None = None
        self._run = torch.ones_like(self.state.theta, dtype=torch.bool)  # halves that ran in this step

    @staticmethod
    def check(model: nn.Module, limits: Sequence[Limit], config: SolverConfig) -> None:
        """Tokens that are to go must be able to."""
        check_tokens(model, config.tokens, [limit.metric for limit in limits])

    @staticmethod
    def prepare(model: nn.Module, config: SolverConfig) -> None:
        """What a converted model needs before its first optimiser: head dims that can compete."""
        if config.balance:
            balance_heads(model)

    def _continue(self) -> None:
        """What the model leaves out already stays out: a search can follow another one."""
        state, blocks = self.state, self.groups.blocks
        v = torch.stack([block.attn.kept_v for block in blocks]).to(state.theta.device)
        qk = torch.stack([block.attn.kept_qk for block in blocks]).to(v.device)
        state.families["v"].dead.copy_(~v.flatten(0, 1))
        state.families["qk"].dead.copy_(~(qk & v.any(-1, keepdim=True)).flatten(0, 1))
        state.families["head"].dead.copy_(~v.any(-1))
        for layer, block in enumerate(blocks):
            state.families["neuron"].dead[layer] = ~block.mlp.kept_neurons.to(v.device)
        skipped = torch.tensor([(b.skip_attn, b.skip_mlp) for b in blocks], device=state.theta.device)
        state.theta[skipped] = -6.0
        skip_gates.empty(state, skipped)
        for family in state.families.values():
            family.s.copy_(family.dead.to(family.s.dtype).mean(1))

    @property
    def progress(self) -> float:
        """Finished fraction of the search."""
        return self.count / self.steps

    def targets(self) -> list[float]:
        """Budgets of this moment: 1 before the annealing, the given ones after it."""
        start, end = self.config.anneal
        share = min(max((self.progress - start) / max(end - start, 1e-9), 0.0), 1.0)
        return [limit.budget**share for limit in self.limits]

    def before(self) -> None:
        """Sets the skips of the coming step: sampled ones really skip, except on gate-update steps, where
        branches get gates. What halves read of tokens is watched where all run.
        """
        all_run = self.state.hard or self.count % self.config.gate_every == 0
        if self.tokens is not None and all_run and self.count % self.config.every == 0:
            self.tokens.watch()
        if self.state.hard:
            return
        run = self._run = skip_gates.sample(self.state, self.config.skip, self.generator)
        update = self.count % self.config.gate_every == 0
        self._gates = tuple(run.float().unbind(1)) if update else None
        if update:
            for gate in self._gates:
                gate.requires_grad_(True)
        for i, block in enumerate(self.groups.blocks):
            if update:
                block.set_gates(self._gates[0][i], self._gates[1][i])
            else:
                block.set_skip(*(not bool(r) for r in run[i]))

    def _run_all(self) -> None:
        """Between steps no sampled skip or gate stays on the model: an evaluation sees all of it."""
        if not self.state.hard:
            for block in self.groups.blocks:
                block.set_gates(None, None)
                block.set_skip(False, False)

    def observe(self, scale: float = 1.0) -> None:
        """Reads gradients: first-order importance of every group, and of the gates.

        ``scale`` divides them (a loss scaler's factor).
        """
        config, state = self.config, self.state
        if self._gates is not None:
            grads = [g.grad if g.grad is not None else torch.zeros_like(g) for g in self._gates]
            skip_gates.update(state, torch.stack(grads, 1) / scale, config)
        if self.count % config.every == 0:
            rate = (1.0 - config.importance_decay) * self._run.to(state.theta.dtype)
            for name, value in self.groups.first_order().items():
                family = state.families[name]
                ran = rate[:, 1 if name == "neuron" else 0].repeat_interleave(len(family.s) // len(rate))
                family.importance.lerp_((value / scale).square(), ran[:, None])
        if self.tokens is not None:
            self.tokens.observe(scale, config.importance_decay)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One solver step on every ``config.every``-th training step: prox, primal, dual, project."""
        config, state = self.config, self.state
        self.count += 1
        self._run_all()
        if not state.hard and self.progress >= config.gate_freeze:
            self.freeze_gates(optimizer)
        if state.settled or (self.count - 1) % config.every or self.progress < config.anneal[0]:
            return
        self.groups.shrink(prox(state, config))
        if self.tokens is not None:
            self.tokens.reprice(state, self.limits)
        primal(state, marginal(state, self.limits), config)
        norms = self.groups.norms()
        targets = self.targets()
        tightened = [last - now for last, now in zip(self._last_targets, targets, strict=True)]
        dual(state, norms, self.limits, targets, tightened, config)
        self._last_targets = targets
        if project(state, norms, self.limits, config):
            self.bury(optimizer)
        if self.tokens is not None and not state.settled and self.tokens.move(self._spends):
            self._drop(state.tokens.gone)

    def _spends(self, gone: list[int]) -> bool:
        """Whether what is alive still uses up a limit with so many buckets of tokens gone at each site."""
        return used(self.state, self.tokens.limits(self.limits, gone)) >= 1.0

    def _drop(self, gone: list[int], ended: bool = False) -> None:
        """The model drops these buckets of tokens, and its costs are those without them."""
        self.state.tokens.gone = gone
        self.limits = self.tokens.limits(self.limits, gone)
        self.tokens.apply(ended)

    def freeze_gates(self, optimizer: torch.optim.Optimizer) -> None:
        """From here on a half runs always or never."""
        skip_gates.freeze(self.state, self.limits)
        self._gates = None
        self.bury(optimizer)

    def bury(self, optimizer: torch.optim.Optimizer) -> None:
        """Dead groups: zero in weights and optimiser, and skipped from the next step on; empty halves too."""
        if self.state.hard and self.config.skip != "none":
            skip_gates.close_empty(self.state, self.limits)
        qk, v, neuron, _ = self.state.alive()
        self.groups.clear(Factors(~qk, ~v, ~neuron), optimizer)
        self._apply(self.state.alive())

    def harden(self) -> None:
        """Ends the search: gates hard, then the greedy projection; the model gets the final structure, at
        most the budget.
        """
        if not self.state.hard:
            skip_gates.freeze(self.state, self.limits)
        if self.tokens is not None:
            self._finish_tokens()
        self._apply(self._projected())

    def _projected(self) -> Masks:
        return project_to_budget(self.state, self.limits, self.config.families)

    def _finish_tokens(self) -> None:
        """Buckets go while they are worth less per cost than the dearest group that would go instead."""
        self.tokens.reprice(self.state, self.limits)
        while True:
            gone = self.tokens.next_below(dearest(self.state, self.limits, self._projected()))
            if gone is None or not self._spends(gone):
                break
            self._drop(gone)
        self._drop(self.state.tokens.gone, ended=True)

    def _apply(self, alive: Masks) -> None:
        """Gives the model its structure; the skips too, once gates are hard."""
        self.groups.apply(alive)
        if self.state.hard:
            self._run = alive[3]
            for block, running in zip(self.groups.blocks, alive[3].tolist(), strict=True):
                block.set_gates(None, None)
                block.set_skip(*(not r for r in running))

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
        if self.tokens is not None:
            out["removed_token"] = float(state.tokens.s.mean())
            out["kept_tokens"] = self.tokens.left[state.tokens.gone[-1]] / self.tokens.left[0]
        for name, family in state.families.items():
            out[f"removed_{name}"] = float(family.s.mean())
            out[f"dead_{name}"] = float(family.dead.float().mean())
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
        if self.tokens is not None:
            self._drop(self.state.tokens.gone)
        self._apply(self.state.alive())

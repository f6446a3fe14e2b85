"""Skips: a gate per half (or block) that is sampled hard, learnt straight through, and frozen before the
search ends.

On most steps a sampled skip really skips. Every ``gate_every``-th step runs all branches and multiplies them
by their hard sample, so that the loss has a gradient with respect to every gate: at g = 1 and at g = 0, whose
mean is the loss change of removing the branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.solver.objective import used
from uvc.solver.state import State


def sample(state: State, skip: str, generator: torch.Generator) -> Tensor:
    """bool [L, 2]: which halves run, drawn with probability sigmoid(theta). ``skip="blocks"`` draws once per
    block.
    """
    draw = torch.rand(state.theta.shape, generator=generator)
    if skip == "blocks":
        draw = draw[:, :1].expand_as(draw)
    return draw < state.gates()


def update(state: State, gate_grad: Tensor, config: SolverConfig) -> None:
    """theta follows usefulness per cost minus the price of the budget, where gradients reach the half.

    gate_grad [L, 2]: dloss/dg. usefulness = -mean(dloss/dg), the loss saved by running the half, in units of
    its rms over all halves.
    """
    if config.skip == "blocks":
        gate_grad = gate_grad.sum(1, keepdim=True).expand_as(gate_grad)
    state.gate_usefulness.mul_(config.gate_momentum).sub_(gate_grad, alpha=1.0 - config.gate_momentum)
    rms = state.gate_usefulness.square().mean().sqrt().clamp_min(1e-12)
    drift = state.gate_usefulness / rms - config.gate_weight * state.z.sum()
    moved = (state.theta + config.gate_rate * drift.clamp(-1.0, 1.0)).clamp(-6.0, 6.0)
    state.theta.copy_(torch.where(state.held(), state.theta, moved))


def freeze(state: State, limits: Sequence[Limit]) -> None:
    """Makes gates hard: the least probable first, a half with probability below 1/2 is skipped while the cost
    stays above the budget (of several: above one of them).
    """
    wanted = ((state.theta < 0) & ~state.held()).flatten()
    order = [half for half in state.theta.flatten().argsort(stable=True).tolist() if wanted[half]]
    state.theta.abs_().clamp_min_(1e-3)
    state.hard = True
    for half in order:
        _skip(state, half, limits)
    remove_halves(state, state.theta < 0)


def _skip(state: State, half: int, limits: Sequence[Limit]) -> None:
    """Skips a half that runs, unless that leaves no limit reached."""
    theta = state.theta.view(-1)
    theta[half] *= -1.0
    if used(state.alive(), limits) < 1.0:
        theta[half] *= -1.0


def remove_halves(state: State, skipped: Tensor) -> None:
    """Marks all groups of the ``skipped`` halves, bool [L, 2], dead."""
    attn, mlp = skipped.unbind(1)
    state.families["neuron"].dead |= mlp[:, None]
    for name in ("qk", "v"):
        state.families[name].dead |= attn.repeat_interleave(state.geometry.heads)[:, None]


def skip_empty(state: State, limits: Sequence[Limit]) -> None:
    """Skips halves that have nothing left but their output bias, which is lost too, while a limit stays
    reached. For hard gates.
    """
    alive = state.alive()
    empty = torch.stack([~alive.v.any(-1).any(-1), ~alive.neuron.any(-1)], 1) & alive.running
    for half in empty.flatten().nonzero().flatten().tolist():
        _skip(state, half, limits)

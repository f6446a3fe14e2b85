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
    draw = torch.rand(state.theta.shape, generator=generator).to(state.theta.device)
    if skip == "blocks":
        draw = draw[:, :1].expand_as(draw)
    return draw < state.gates()


def update(state: State, gate_grad: Tensor, config: SolverConfig) -> None:
    """theta follows usefulness per cost minus the price of the budget.

    gate_grad [L, 2]: dloss/dg. usefulness = -mean(dloss/dg), the loss saved by running the half, in units of
    its rms over all halves.
    """
    if config.skip == "blocks":
        gate_grad = gate_grad.sum(1, keepdim=True).expand_as(gate_grad)
    state.gate_usefulness.mul_(config.gate_momentum).sub_(gate_grad, alpha=1.0 - config.gate_momentum)
    rms = state.gate_usefulness.square().mean().sqrt().clamp_min(1e-12)
    drift = state.gate_usefulness / rms - config.gate_weight * state.z.sum()
    state.theta.add_(config.gate_rate * drift.clamp(-1.0, 1.0)).clamp_(-6.0, 6.0)


def freeze(state: State, limits: Sequence[Limit]) -> None:
    """Makes gates hard: the least probable first, a half with probability below 1/2 is skipped while the cost
    stays above the budget (of several: above one of them).
    """
    wanted = [i for i in state.theta.flatten().argsort(stable=True).tolist() if state.theta.view(-1)[i] < 0]
    state.theta.abs_().clamp_min_(1e-3)
    state.hard = True
    for i in wanted:
        state.theta.view(-1)[i] *= -1.0
        if used(state, limits) < 1.0:
            state.theta.view(-1)[i] *= -1.0
    empty(state, state.theta < 0)


def empty(state: State, skipped: Tensor) -> None:
    """Marks all groups of the ``skipped`` halves, bool [L, 2], dead."""
    attn, mlp = skipped.unbind(1)
    heads = state.geometry.heads
    state.families["neuron"].dead |= mlp[:, None]
    state.families["head"].dead |= attn[:, None]
    for name in ("qk", "v"):
        state.families[name].dead |= attn.repeat_interleave(heads)[:, None]


def close_empty(state: State, limits: Sequence[Limit]) -> None:
    """Skips halves that have nothing left but their output bias, which goes too, while the cost stays at or
    above the budget. For hard gates.
    """
    _, v, neuron, running = state.alive()
    empty = torch.stack([~v.any(-1).any(-1), ~neuron.any(-1)], 1) & running
    for layer, half in empty.nonzero().tolist():
        state.theta[layer, half].neg_()
        if used(state, limits) < 1.0:
            state.theta[layer, half].neg_()

"""AdamW that passes over runs of weight rows which are pruned and zero; else it is torch's fused AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import uvc_kernels
from torch import Tensor, nn
from uvc_kernels.adamw import REMOVED

from uvc.layers.prunable import Prunable

# Without the hooks, which must run once in a step and not twice.
_step_of_torch = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the same state, numbers and checkpoints, over the rows that can change.

    Args:
        params: as torch takes them.
        model: its UVC layers say which rows are removed, from step to step.
    """

    def __init__(self, params, model: nn.Module, **options) -> None:
        super().__init__(params, **{"fused": True, **options})
        self._layers = [module for module in model.modules() if isinstance(module, Prunable)]
        # Of each layer with removed rows its masks, and of its weights what is known of their rows since.
        self._known: dict[Prunable, tuple[tuple, dict[nn.Parameter, Tensor]]] = {}

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; as torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        rows = {} if scaled else self._rows()
        groups = self._served(rows) if rows else []
        grads = {p: p.grad for _, weights in groups for p in weights}
        for p in grads:
            p.grad = None
        try:
            _step_of_torch(self)
        finally:
            for p, grad in grads.items():
                p.grad = grad
        for group, weights in groups:
            if not weights:
                continue
            states = [self.state[p] for p in weights]
            for state in states:
                state["step"] += 1
            uvc_kernels.adamw(
                weights,
                [grads[p] for p in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [rows[p] for p in weights],
                [float(state["step"]) for state in states],
                group["lr"],
                group["betas"],
                group["weight_decay"],
                group["eps"],
            )
        return loss

    def _rows(self) -> dict[nn.Parameter, Tensor]:
        """What is known of the rows of every weight that has removed ones."""
        found = {}
        for layer in self._layers:
            if (masks := layer.masks) is None:
                continue
            if layer not in self._known or self._known[layer][0] is not masks:
                rows = {p: REMOVED * removed.to(torch.uint8) for p, removed in layer.removed_rows().items()}
                self._known[layer] = masks, rows
            found.update(self._known[layer][1])
        return found

    def _served(self, rows: dict[nn.Parameter, Tensor]) -> list[tuple[dict, list[nn.Parameter]]]:
        """By parameter group, those of the weights that the op can step."""
        # A learning rate in a tensor, and what AdamW's variants do, is torch's.
        plain = (
            g for g in self.param_groups if not (g["amsgrad"] or g["maximize"] or isinstance(g["lr"], Tensor))
        )
        return [
            (group, [p for p in group["params"] if p in rows and _steppable(p, self.state.get(p, {}))])
            for group in plain
        ]


def _steppable(p: nn.Parameter, state: dict) -> bool:
    """Whether `p` is a matrix of floats on the CPU with a gradient and averages; torch makes those first."""
    tensors = (p, p.grad, state.get("exp_avg"), state.get("exp_avg_sq"))
    return all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 and t.is_contiguous()
        for t in tensors
    )

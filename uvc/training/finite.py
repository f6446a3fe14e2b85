"""A run stops at a loss or gradient that is not finite, before that reaches the weights; so many as
`skip_not_finite` says are left out first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from uvc.io.finite import first_not_finite
from uvc.solver.rows import local, whole


class FiniteCheck:
    """Looks at loss and gradient norm of every step: on the CPU at once, on other devices when ``read`` is
    called, so that no step waits for the device.
    """

    def __init__(self, model: nn.Module, phase: str, kept: Callable[[], str]) -> None:
        """kept: says what is left of the run, for the error."""
        self.model, self.phase, self.kept = model, phase, kept
        self.epoch = self.batch = 0
        self.pending: list[tuple[int, int, Tensor]] = []

    def at(self, epoch: int, batch: int) -> None:
        """The step that comes next."""
        self.epoch, self.batch = epoch, batch

    def where(self) -> str:
        """The step, for a message."""
        return f"{self.phase}: epoch {self.epoch}, batch {self.batch}"

    def see(self, loss: Tensor, norm: Tensor, images: Tensor) -> None:
        """loss, norm: scalars of this step, before its update. RuntimeError if one is not finite."""
        pair = torch.stack([loss.detach().float(), norm.float()])
        self.pending.append((self.epoch, self.batch, pair))
        if loss.device.type == "cpu":
            self.read(images)

    def finite(self, loss: Tensor) -> bool:
        """Whether loss and gradients of this step are finite; waits for the device."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        return bool(loss.isfinite()) and bool(norm.isfinite())

    def read(self, images: Tensor | None = None) -> None:
        """RuntimeError if loss or norm of a step seen since the last call was not finite. images: of the last
        step, searched for the cause.
        """
        if self.pending:
            values = torch.stack([pair for _, _, pair in self.pending]).tolist()
            for (epoch, batch, _), (loss, norm) in zip(self.pending, values, strict=True):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self._stop(epoch, batch, loss, norm, images)
            self.pending.clear()

    def _stop(self, epoch: int, batch: int, loss: float, norm: float, images: Tensor | None) -> None:
        named = dict(self.model.named_parameters())
        parameters = {name: local(p.detach()) for name, p in named.items()}
        gradients = {name: local(p.grad) for name, p in named.items() if p.grad is not None}
        name = first_not_finite(gradients) or first_not_finite(parameters)
        where = f", first in {name}" if name else ""
        cause = "lower the learning rate, or look at the images and labels of this batch"
        if images is not None and not images.isfinite().all():
            at = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
            cause = f"image {at} of this batch holds NaN or infinite values"
        raise RuntimeError(
            f"{self.phase}: epoch {epoch}, batch {batch}: the loss is {loss:g} and the norm of the gradient "
            f"{norm:g}{where}; {cause}; {self.kept()}"
        )

"""The factor of the loss under which gradients fit float16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from uvc.solver.rows import whole

FIRST, LEAST = 2.0**16, 1.0
GROWS_AFTER = 2000  # steps without an overflow


class LossScale:
    """A loss is multiplied by `value` before its backward pass, and the gradients are divided by it after.

    Gradients of float16 below 6e-8 are lost, those above 65504 are infinite. The factor, a power of two,
    halves when one is infinite, until none is, and doubles after many steps in which none was.

    precision: of the products; in any but "float16" the factor is 1, and stays it.
    """

    def __init__(self, precision: str) -> None:
        self.moves = precision == "float16"
        self.value, self._fitted = FIRST if self.moves else 1.0, 0

    def backward(self, loss: Tensor) -> None:
        """The gradients of `value` times the loss."""
        (loss * self.value if self.moves else loss).backward()

    def fits(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the gradients are finite, or no smaller factor can make them so; else the factor halves."""
        if not self.moves:
            return True
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.value <= LEAST or bool(norm.isfinite()):
            return True
        self.value, self._fitted = self.value / 2, 0
        return False

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients by the factor of their loss, which may then grow."""
        if not self.moves:
            return
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.value)
        self._fitted += 1
        if self._fitted == GROWS_AFTER:
            self.value, self._fitted = 2 * self.value, 0

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.value, self._fitted]

    def load_state(self, state: list[float]) -> None:
        """Inverse of `state`."""
        self.value, self._fitted = state

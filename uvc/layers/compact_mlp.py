"""MLPs after compaction: plain torch on small weights.

B batch, N tokens, D width, F' kept neurons.
"""

import copy

import torch
from torch import Tensor, nn

from uvc.layers.children import product, product_onto, runs_as_it_is, writes_onnx
from uvc.layers.small_weights import PADDING, after, smaller, take_parts, through_part, without_inputs

# Neurons are padded to multiples of it: at 197 tokens both products of 374 took 4% longer than those of 376.
NEURONS = 8

# What may lie around its products.
PARTS = {"drop1", "norm", "drop2"}


class CompactMlp(nn.Module):
    """The two linear layers over the kept neurons only; in the padded form some more, which are zero."""

    # Whether the kept neurons are multiplied by gates, so that a neuron of zeros gives zero.
    GATED = False

    def __init__(self, dense: nn.Module, neurons: tuple[int, ...], form: str = "grouped"):
        super().__init__()
        rows = list(neurons)
        if form == "padded" and (self.GATED or gives_zero(dense.act)):
            size = min(-(-len(rows) // NEURONS) * NEURONS, dense.fc2.in_features)
            rows += [PADDING] * (size - len(rows))
        self._keep_rows(dense, rows)
        self.act = copy.deepcopy(dense.act)
        take_parts(self, dense, "drop1", *(["norm"] if dense.NORM_INSIDE else []))
        self.fc2 = smaller(dense.fc2, columns=rows)
        take_parts(self, dense, "drop2")
        bare = self.fc2.in_features > 0 and not self._modules.keys() & PARTS
        self._children = len(self._modules) if bare else None

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.fc1 = smaller(dense.fc1, rows=neurons)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        return self._modules["act"](product(self._modules["fc1"], x))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        fc2 = self._modules["fc2"]
        if fc2.in_features == 0:
            return through_part(self, "drop2", without_inputs(fc2, x))
        if x.dim() > 2 and writes_onnx():
            # Of matrices all along, so that nothing is reshaped between its products.
            return self.forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return through_part(self, "drop2", product(fc2, self._read(x)))

    def adds(self) -> bool:
        """Whether calling it ends in a product, which may add to something else."""
        return len(self._modules) == self._children and runs_as_it_is(self)

    def onto(self, total: Tensor, x: Tensor, gamma: Tensor | None) -> Tensor:
        """total + gamma times what it makes of x, where it `adds`."""
        return product_onto(total, self._modules["fc2"], self.hidden(x), gamma)

    def _read(self, x: Tensor) -> Tensor:
        """What the last layer reads."""
        return through_part(self, "norm", through_part(self, "drop1", self.hidden(x)))


class CompactGluMlp(CompactMlp):
    """A gated MLP whose fc1 holds value and gate, one behind the other."""

    GATED = True

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.gate_last = dense.gate_last
        self.fc1 = smaller(dense.fc1, rows=neurons + after(dense.fc2.in_features, neurons))

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        a, b = product(self.fc1, x).chunk(2, dim=-1)
        return a * self.act(b) if self.gate_last else self.act(a) * b


class CompactSwiGLU(CompactMlp):
    """A gated MLP of two first layers, fc1_g the gate and fc1_x the value."""

    GATED = True

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.fc1_g, self.fc1_x = smaller(dense.fc1_g, rows=neurons), smaller(dense.fc1_x, rows=neurons)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        return self.act(product(self.fc1_g, x)) * product(self.fc1_x, x)


def gives_zero(act: nn.Module) -> bool:
    """Whether an activation without weights is zero at zero, so that columns behind it get no gradient."""
    zero = torch.zeros(1, device="cpu")
    with torch.no_grad():
        return not any(True for _ in act.parameters()) and bool(act(zero) == 0)

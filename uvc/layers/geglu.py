"""The gated MLP of ViTamin, which normalises its input itself.

B batch, N tokens, D width, F hidden.
"""

import copy

from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from uvc.layers.children import product
from uvc.layers.compact_mlp import CompactMlp
from uvc.layers.mlp import Neurons
from uvc.layers.prunable import Part, rows
from uvc.layers.small_weights import smaller


class CompactGeGluMlp(CompactMlp):
    """The kept neurons of a GeGluMlp: w0 the gate, w1 the value."""

    GATED = True

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.w0, self.w1 = smaller(dense.w0, rows=neurons), smaller(dense.w1, rows=neurons)
        self.norm_first = copy.deepcopy(dense.norm)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        x = self.norm_first(x)
        return self.act(product(self.w0, x)) * product(self.w1, x)


class UVCGeGluMlp(Neurons, GeGluMlp):
    """timm's GeGluMlp: w1 is the value, w0 the gate, w2 the second layer."""

    LINEARS = ("w0", "w1", "w2")
    SMALL = CompactGeGluMlp
    NORM_INSIDE = False

    def _be_dense(self) -> None:
        super()._be_dense()
        # Older versions of timm have no dropout here.
        for name in ("drop1", "drop2"):
            if name not in self._modules:
                setattr(self, name, nn.Identity())

    @property
    def fc2(self) -> nn.Module:
        """The second layer, under the name it has in other MLPs."""
        return self.w2

    def prepared(self, x: Tensor) -> Tensor:
        """The normalised input."""
        return self.norm(x)

    def _rows(self) -> list[Part]:
        return [part for linear in (self.w1, self.w0) for part in rows("neuron", linear, 0, self.neurons)]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.act(self.w0(x)) * self.w1(x)

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        return self.w1.weight, self.w1.bias, self.w0.weight, self.w0.bias

"""UVCMlp: timm's Mlp that can leave out hidden neurons and compute only the rest.

B batch, N tokens, D width, F hidden.
"""

import functools

import timm.layers
import torch
import torch.nn.functional as F
import uvc_kernels
from timm.layers import Mlp
from torch import Tensor, nn

from uvc.layers._common import say_once, take_over


class UVCMlp(Mlp):
    """Two linear layers with timm's arguments, state_dict keys and, while dense, timm's own forward.

    A structure (`set_kept`) removes hidden neurons without touching the weights.
    """

    @functools.wraps(Mlp.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    @classmethod
    def take_over(cls, mlp: Mlp) -> "UVCMlp":
        """A UVCMlp on the parameters and hooks of `mlp`, with nothing removed."""
        new = take_over(cls, mlp)
        new._be_dense()
        return new

    def _be_dense(self) -> None:
        # The mask is the record and stays on the CPU; the indices follow the weights from device to device.
        self._mask: Tensor | None = None
        self._kept: uvc_kernels.KeptNeurons | None = None
        self._packed: list[Tensor | None] | None = None

    def set_kept(self, neurons: Tensor | None) -> None:
        """Keep the hidden neurons marked in the bool mask [F] `neurons`; None keeps all.

        ValueError for a mask of another shape or dtype, or for a layer whose normalisation forbids removal.
        """
        if neurons is None:
            return self._be_dense()
        whole, got = [self.fc1.weight.shape[0]], f"{neurons.dtype} {list(neurons.shape)}"
        if neurons.dtype != torch.bool or list(neurons.shape) != whole:
            raise ValueError(f"neurons must be a bool mask of shape {whole}, got {got}")
        if neurons.all():
            return self._be_dense()
        if fault := mlp_fault(self):
            raise ValueError(f"cannot remove neurons of this UVCMlp: {fault}")
        self._mask = neurons.cpu().clone()
        self._kept = uvc_kernels.kept_neurons(self._mask, self.fc1.weight.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = self._kept.to(self.fc1.weight.device)
        return self

    def packing(self) -> tuple[list, list, list, list]:
        """What `uvc_kernels.gather` takes to pack the kept weights; not for a dense layer."""
        return uvc_kernels.mlp_packing(
            self.fc1.weight, self.fc1.bias, None, None, self.fc2.weight, self._kept
        )

    def take_packed(self, packed: list[Tensor | None] | None) -> None:
        """Use these packed weights (see `packing`) from now on; None packs in every call."""
        self._packed = packed

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self._mask is None

    @property
    def kept_neurons(self) -> Tensor:
        """Bool mask [F] of the kept neurons, on the CPU."""
        if self._mask is None:
            return torch.ones(self.fc1.weight.shape[0], dtype=torch.bool, device="cpu")
        return self._mask.clone()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        if self._mask is None:
            return super().forward(x)
        activation = activation_name(self.act)
        dropout = self.training and self.drop1.p > 0.0
        if activation is not None and not dropout:
            weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return self.drop2(uvc_kernels.mlp(x, *weights, self._kept, activation, packed=self._packed))
        reason = "dropout on the neurons" if dropout else f"the activation {type(self.act).__name__}"
        say_once(f"UVCMlp: {reason} is outside the fast op; plain torch computes the kept neurons")
        neurons = self._kept.neurons
        bias = None if self.fc1.bias is None else self.fc1.bias[neurons]
        hidden = self.drop1(self.act(F.linear(x, self.fc1.weight[neurons], bias)))
        return self.drop2(F.linear(hidden, self.fc2.weight[:, neurons], self.fc2.bias))


def activation_name(act: nn.Module) -> str | None:
    """The name of `act` among the activations of `uvc_kernels.mlp`; None when it has none."""
    kind = type(act)
    if kind is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    names = {
        timm.layers.activations.GELU: "gelu",
        timm.layers.activations.GELUTanh: "gelu_tanh",
        timm.layers.activations.QuickGELU: "quick_gelu",
        nn.ReLU: "relu",
        nn.SiLU: "silu",
    }
    return names.get(kind)


def mlp_fault(mlp: Mlp) -> str | None:
    """Why neurons of `mlp` cannot be removed, naming the child that forbids it; None when they can."""
    if not isinstance(mlp.norm, nn.Identity):
        return f"norm is a {type(mlp.norm).__name__}, whose statistics change when neurons are removed"
    for child in ("fc1", "fc2"):
        if type(getattr(mlp, child)) is not nn.Linear:
            return f"{child} is a {type(getattr(mlp, child)).__name__}, not a plain nn.Linear"
    return None

"""timm's MLPs, plain and gated, that can leave out hidden neurons and compute only the rest.

A neuron of a gated MLP is a row of the value, the row of the gate that multiplies it, and a column of fc2.
B batch, N tokens, D width, F hidden.
"""

import functools
from typing import Self

import timm.layers
import torch
import torch.nn.functional as F
import uvc_kernels
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from uvc.layers._surgery import say_once, take_over


class Neurons(nn.Module):
    """What makes an MLP of timm's leave out hidden neurons: a parent before timm's class.

    While dense, timm's own forward runs. A structure (`set_kept`) removes hidden neurons without touching the
    weights.
    """

    @classmethod
    def take_over(cls, mlp: nn.Module) -> Self:
        """One of these on the parameters and hooks of `mlp`, with nothing removed."""
        new = take_over(cls, mlp)
        new._be_dense()
        return new

    # Of the class, so that it holds for layers taken over too.
    _recompute = False

    def _be_dense(self) -> None:
        # The mask is the record and stays on the CPU; the indices follow the weights from device to device.
        self._mask: Tensor | None = None
        self._kept: uvc_kernels.KeptNeurons | None = None
        self._packed: list[Tensor | None] | None = None

    def neuron_rows(self) -> list[tuple[nn.Parameter, int]]:
        """Every parameter with a row for each neuron, and its first such row; fc2's columns are the rest."""
        return [(p, 0) for p in self.fc1.parameters()]

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        """Weight and bias of the value, weight and bias of the gate."""
        return self.fc1.weight, self.fc1.bias, None, None

    def set_kept(self, neurons: Tensor | None) -> None:
        """Keep the hidden neurons marked in the bool mask [F] `neurons`; None keeps all.

        ValueError for a mask of another shape or dtype, or for a layer whose normalisation forbids removal.
        """
        if neurons is None:
            return self._be_dense()
        whole, got = [self.fc2.weight.shape[1]], f"{neurons.dtype} {list(neurons.shape)}"
        if neurons.dtype != torch.bool or list(neurons.shape) != whole:
            raise ValueError(f"neurons must be a bool mask of shape {whole}, got {got}")
        if neurons.all():
            return self._be_dense()
        if fault := mlp_fault(self):
            raise ValueError(f"cannot remove neurons of this {type(self).__name__}: {fault}")
        self._mask = neurons.cpu().clone()
        self._kept = uvc_kernels.kept_neurons(self._mask, self.fc2.weight.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = self._kept.to(self.fc2.weight.device)
        return self

    def packing(self) -> tuple[list, list, list, list]:
        """What `uvc_kernels.gather` takes to pack the kept weights; not for a dense layer."""
        return uvc_kernels.mlp_packing(*self._first_layer(), self.fc2.weight, self._kept)

    def set_recompute(self, on: bool) -> None:
        """Whether the backward pass computes the first product again, of kept rows, instead of keeping it."""
        self._recompute = bool(on)

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
            return torch.ones(self.fc2.weight.shape[1], dtype=torch.bool, device="cpu")
        return self._mask.clone()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        if self._mask is None:
            return super().forward(x)
        activation = activation_name(self.act)
        dropout = self.training and self.drop1.p > 0.0
        value, bias, gate, gate_bias = self._first_layer()
        if activation is not None and not dropout:
            weights = (value, bias, self.fc2.weight, self.fc2.bias, self._kept, activation, gate, gate_bias)
            return self.drop2(uvc_kernels.mlp(x, *weights, packed=self._packed, recompute=self._recompute))
        reason = "dropout on the neurons" if dropout else f"the activation {type(self.act).__name__}"
        say_once(
            f"{type(self).__name__}: {reason} is outside the fast op; plain torch computes the kept neurons"
        )
        hidden = self._kept_linear(x, value, bias)
        hidden = (
            self.act(hidden) if gate is None else self.act(self._kept_linear(x, gate, gate_bias)) * hidden
        )
        return self.drop2(F.linear(self.drop1(hidden), self.fc2.weight[:, self._kept.neurons], self.fc2.bias))

    def _kept_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        neurons = self._kept.neurons
        return F.linear(x, weight[neurons], None if bias is None else bias[neurons])


class UVCMlp(Neurons, Mlp):
    """Two linear layers with timm's arguments, state_dict keys and, while dense, timm's own forward.

    A structure (`set_kept`) removes hidden neurons without touching the weights.
    """

    @functools.wraps(Mlp.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()


class UVCGluMlp(Neurons, GluMlp):
    """timm's GluMlp (its SwiGLUPacked too): fc1 holds the F rows of the value and the F rows of the gate."""

    @functools.wraps(GluMlp.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    def neuron_rows(self) -> list[tuple[nn.Parameter, int]]:
        """Every parameter with rows for neurons, and the first such row, of the value and of the gate."""
        return [(p, start) for p in self.fc1.parameters() for start in (0, self.fc2.in_features)]

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        weights = self.fc1.weight.chunk(2)
        biases = (None, None) if self.fc1.bias is None else self.fc1.bias.chunk(2)
        value, gate = (0, 1) if self.gate_last else (1, 0)
        return weights[value], biases[value], weights[gate], biases[gate]


class UVCSwiGLU(Neurons, SwiGLU):
    """timm's SwiGLU: fc1_x is the value, fc1_g the gate."""

    @functools.wraps(SwiGLU.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    def neuron_rows(self) -> list[tuple[nn.Parameter, int]]:
        """Every parameter with a row for each neuron, and its first such row."""
        return [(p, 0) for linear in (self.fc1_x, self.fc1_g) for p in linear.parameters()]

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        return self.fc1_x.weight, self.fc1_x.bias, self.fc1_g.weight, self.fc1_g.bias


# What takes the place of each of timm's MLPs.
MLPS = {Mlp: UVCMlp, GluMlp: UVCGluMlp, SwiGLU: UVCSwiGLU}


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


def mlp_fault(mlp: Mlp | GluMlp | SwiGLU) -> str | None:
    """Why neurons of `mlp` cannot be removed, naming the child that forbids it; None when they can."""
    if not isinstance(mlp.norm, nn.Identity):
        return f"norm is a {type(mlp.norm).__name__}, whose statistics change when neurons are removed"
    for child in ("fc1_g", "fc1_x", "fc2") if isinstance(mlp, SwiGLU) else ("fc1", "fc2"):
        if type(getattr(mlp, child)) is not nn.Linear:
            return f"{child} is a {type(getattr(mlp, child)).__name__}, not a plain nn.Linear"
    return None

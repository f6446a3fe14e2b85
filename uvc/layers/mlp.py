"""timm's MLPs, plain and gated, that can leave out hidden neurons and compute only the rest.

A neuron of a gated MLP is a row of the value, the row of the gate that multiplies it, and a column of fc2.
B batch, N tokens, D width, F hidden.
"""

import functools

import timm.layers
import torch
import torch.nn.functional as F
import uvc_kernels
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn
from uvc_kernels.warn_once import warn_once

from uvc.layers.children import (
    DROPS,
    drop_rate,
    has_weights,
    is_plain,
    is_untouched,
    linear_fault,
    say_called,
    watched,
)
from uvc.layers.columns import columns_of
from uvc.layers.compact_mlp import CompactGluMlp, CompactMlp, CompactSwiGLU
from uvc.layers.prunable import Part, Prunable, device_of, rows
from uvc.layers.small_weights import without_inputs


class Neurons(Prunable):
    """What makes an MLP of timm's leave out hidden neurons: a parent before timm's class.

    While dense, timm's own forward runs. A structure (`set_kept`) removes hidden neurons without touching the
    weights.
    """

    LINEARS = ("fc1", "fc2")
    SMALL = CompactMlp
    # Whether the child `norm` is over the neurons.
    NORM_INSIDE = True

    @classmethod
    def fault(cls, mlp: nn.Module) -> str | None:
        """Why neurons of `mlp`, timm's or one of these, cannot be removed; None when they can."""
        return linear_fault(mlp, *cls.LINEARS)

    def ties(self) -> dict[str, str]:
        """A norm over the neurons ties them."""
        if not self.NORM_INSIDE or type(self.norm) is nn.Identity:
            return {}
        return {"neurons": f"norm is a {type(self.norm).__name__}, whose statistics are over all of them"}

    def whole(self, masks: tuple[Tensor]) -> dict[str, bool]:
        """Whether the mask keeps all neurons, or none at all."""
        return {"neurons": bool(masks[0].all()) or not masks[0].any()}

    def parts(self) -> list[Part]:
        """A neuron is its rows of the first layers, and a column of fc2."""
        return [Part("neuron", *columns_of(self.fc2), self.neurons, 1, True), *self._rows()]

    def _rows(self) -> list[Part]:
        return rows("neuron", self.fc1, 0, self.neurons)

    @property
    def neurons(self) -> int:
        """F, the hidden neurons of the dense layer."""
        return self.fc2.in_features

    def compacted(self, record, form: str = "grouped") -> nn.Module:
        """A copy of what `record`, a structure's entry, keeps, in plain torch, in one of `FORMS`."""
        return self.SMALL(self, record.neurons, form)

    def prepared(self, x: Tensor) -> Tensor:
        """What the first layers read of x [B, N, D]."""
        return x

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        """Weight and bias of the value, weight and bias of the gate."""
        return self.fc1.weight, self.fc1.bias, None, None

    def set_kept(self, neurons: Tensor | None) -> None:
        """Keep the hidden neurons marked in the bool mask [F] `neurons`; None keeps all.

        ValueError for a mask of another shape or dtype, or for a layer whose normalisation forbids removal.
        """
        if neurons is None:
            return self._be_dense()
        whole, got = [self.neurons], f"{neurons.dtype} {list(neurons.shape)}"
        if neurons.dtype != torch.bool or list(neurons.shape) != whole:
            raise ValueError(f"neurons must be a bool mask of shape {whole}, got {got}")
        if neurons.all():
            return self._be_dense()
        if fault := self.fault(self) or self.torn((neurons,)):
            raise ValueError(f"cannot remove neurons of this {type(self).__name__}: {fault}")
        self._masks = (neurons.cpu().clone(),)
        self._kept = self._index(device_of(self))

    def _index(self, device: torch.device) -> uvc_kernels.KeptNeurons:
        return uvc_kernels.kept_neurons(*self._masks, device)

    @property
    def reads_weights(self) -> bool:
        """Whether the layer may read its children's weights, as calling the children would do no more."""
        children = self._modules
        return (
            all([is_plain(children[name]) for name in self.LINEARS])
            and ((act := children["act"]).__class__ in FAST or not has_weights(act))
            and is_untouched(act)
            and type(children["drop1"]) in DROPS
            and is_untouched(children["drop1"])
            and (not self.NORM_INSIDE or type(children["norm"]) is nn.Identity)
            and is_untouched(children["norm"])
            and not watched()
        )

    def packing(self) -> tuple[list, list, list, list]:
        """What `uvc_kernels.gather` takes to pack the kept weights; not for a dense layer."""
        fc2 = self.fc2
        return uvc_kernels.mlp_packing(
            *self._first_layer(), fc2.weight, fc2.bias, self.kept(fc2.weight.device)
        )

    @property
    def kept_neurons(self) -> Tensor:
        """Bool mask [F] of the kept neurons, on the CPU."""
        if self._masks is None:
            return torch.ones(self.neurons, dtype=torch.bool, device="cpu")
        return self._masks[0].clone()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        if self._masks is None:
            return super().forward(x)
        if x.is_meta or not self.reads_weights:
            if "neurons" in self.ties() and not self._masks[0].any():
                return self.drop2(without_inputs(self.fc2, x))
            say_called(self, x)
            return self._called(x)
        x, fc2, activation = self.prepared(x), self.fc2, activation_name(self.act)
        kept = self.kept(fc2.weight.device)
        dropout = drop_rate(self.drop1)
        value, bias, gate, gate_bias = self._first_layer()
        if activation is not None and not dropout:
            weights = (value, bias, fc2.weight, fc2.bias, kept, activation, gate, gate_bias)
            return self.drop2(uvc_kernels.mlp(x, *weights, packed=self._packed, recompute=self._recompute))
        reason = "dropout on the neurons" if dropout else f"the activation {type(self.act).__name__}"
        warn_once(
            f"{type(self).__name__}: {reason} is outside the fast op; plain torch computes the kept neurons"
        )
        neurons = kept.neurons
        hidden = rows_of(x, value, bias, neurons)
        hidden = self.act(hidden) if gate is None else self.act(rows_of(x, gate, gate_bias, neurons)) * hidden
        return self.drop2(F.linear(self.drop1(hidden), fc2.weight[:, neurons], fc2.bias))

    def _hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> all neurons [B, N, F], from the children."""
        return self.act(self.fc1(x))

    def _called(self, x: Tensor) -> Tensor:
        """Every child is called on all neurons, and what is removed is zero: no faster than dense."""
        hidden = self.drop1(self._hidden(self.prepared(x)))
        hidden = self.norm(hidden) if self.NORM_INSIDE else hidden
        return self.drop2(self.fc2(hidden.masked_fill(self.kept(x.device).whole < 0, 0.0)))


def rows_of(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """x [..., D] times the given rows of a linear layer."""
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


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

    SMALL = CompactGluMlp

    @functools.wraps(GluMlp.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    def _rows(self) -> list[Part]:
        F = self.neurons
        value, gate = (rows("neuron", self.fc1, start, F) for start in (0, F))
        return [part for pair in zip(value, gate, strict=True) for part in pair]

    def _hidden(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return a * self.act(b) if self.gate_last else self.act(a) * b

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        weights = self.fc1.weight.chunk(2)
        biases = (None, None) if self.fc1.bias is None else self.fc1.bias.chunk(2)
        value, gate = (0, 1) if self.gate_last else (1, 0)
        return weights[value], biases[value], weights[gate], biases[gate]


class UVCSwiGLU(Neurons, SwiGLU):
    """timm's SwiGLU: fc1_x is the value, fc1_g the gate."""

    LINEARS = ("fc1_g", "fc1_x", "fc2")
    SMALL = CompactSwiGLU

    @functools.wraps(SwiGLU.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    def _rows(self) -> list[Part]:
        linears = (self.fc1_x, self.fc1_g)
        return [part for linear in linears for part in rows("neuron", linear, 0, self.neurons)]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.act(self.fc1_g(x)) * self.fc1_x(x)

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        return self.fc1_x.weight, self.fc1_x.bias, self.fc1_g.weight, self.fc1_g.bias


# nn.GELU has two names.
FAST = {
    nn.GELU: None,
    timm.layers.activations.GELU: "gelu",
    timm.layers.activations.GELUTanh: "gelu_tanh",
    timm.layers.activations.QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def activation_name(act: nn.Module) -> str | None:
    """The name of `act` among the activations of `uvc_kernels.mlp`; None when it has none."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return FAST.get(type(act))

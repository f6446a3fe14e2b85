"""What attention and MLPs that can leave parts out have in common: masks, and what is derived from them."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
import uvc_kernels
from torch import Tensor, nn

from uvc.layers._surgery import take_over

Kept = uvc_kernels.KeptHeads | uvc_kernels.KeptNeurons

# In messages.
NAMES = {"heads": "heads", "qk": "q/k dims", "v": "v dims", "neurons": "neurons"}


class Part(NamedTuple):
    """A slice of a parameter, whose rows (dim 0) or columns (dim 1) are all units of one family, in order.

    family: the units of "qk" and "v" are the dims of all heads, head by head; of "neuron" the neurons. gates:
    a factor on a row or column here is one on all that its unit contributes; true of one side of every unit.
    """

    family: str
    parameter: nn.Parameter
    start: int
    size: int
    dim: int
    gates: bool = False


def rows(family: str, linear: nn.Module, start: int, size: int, gates: bool = False) -> list[Part]:
    """The parts that are rows of weight and bias of a linear layer."""
    found = (linear.weight, linear.bias)
    return [Part(family, parameter, start, size, 0, gates) for parameter in found if parameter is not None]


class UnitCost(NamedTuple):
    """What one unit of a family costs: parameters, and multiply-accumulates per token in linear layers.

    These are of rows, which read what reaches the layer, and of columns, which give what leaves it.
    """

    params: int
    rows: int
    columns: int

    @property
    def macs(self) -> int:
        """Those of both."""
        return self.rows + self.columns


class Prunable(nn.Module):
    """A parent before timm's class, which runs while nothing is removed.

    Bool masks on the CPU are the record of what is kept. The index tensors that ops read follow from them and
    are made where the weights are, whenever they are missing or elsewhere: they are part of no copy or file.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._be_dense()

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """One of these on the parameters, children and hooks of `module`, with nothing removed."""
        new = take_over(cls, module)
        new._be_dense()
        return new

    # Of the class, so that it holds for layers taken over too.
    _recompute = False

    def _be_dense(self) -> None:
        self._masks: tuple[Tensor, ...] | None = None
        self._kept: Kept | None = None
        self._packed: Iterable[Tensor | None] | None = None

    def _index(self, device: torch.device) -> Kept:
        """The index tensors of the masks, on `device`."""
        raise NotImplementedError

    def kept(self, device: torch.device) -> Kept:
        """The index tensors on `device`; not for a dense layer."""
        kept = self._kept
        if kept is None or kept.flat.device != device:
            movable = kept is not None and not kept.flat.is_meta
            kept = self._kept = kept.to(device) if movable else self._index(device)
        return kept

    def selection(self) -> tuple[tuple[Tensor, ...] | None, Kept | None]:
        """What is kept, to be taken up again by `select` without being derived anew."""
        return self._masks, self._kept

    def select(self, selection: tuple[tuple[Tensor, ...] | None, Kept | None]) -> None:
        """Keep what was kept when this layer's `selection` was taken."""
        self._masks, self._kept = selection

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None, "_packed": None}

    def set_recompute(self, on: bool) -> None:
        """Whether the backward pass computes the first product again, of kept rows, instead of keeping it."""
        self._recompute = bool(on)

    # Of the class, too: whether the last pass has read what `take_packed` gave; before the first one, yes.
    asks_for_packed = True

    def take_packed(self, packed: Iterable[Tensor | None] | None) -> None:
        """Use these packed weights (see `packing`) from now on; None packs in every call."""
        if self._packed is not None:
            self.asks_for_packed = getattr(self._packed, "read", True)
        self._packed = packed

    @classmethod
    def fault(cls, module: nn.Module) -> str | None:
        """Why one of these cannot take the place of `module`, naming the child that forbids it, or None."""
        raise NotImplementedError

    def ties(self) -> dict[str, str]:
        """Families of which all units stay ("heads", "qk", "v", "neurons"), each with what ties them."""
        return {}

    def multiples(self) -> dict[str, int]:
        """Families whose units go in multiples of more than one."""
        return {}

    def torn(self, masks: tuple[Tensor, ...] | None = None) -> str | None:
        """What of tied units is kept in part, and what ties them, by these masks (None: its own); else None.

        Where no unit is kept, nothing is left that could tie them.
        """
        masks = self._masks if masks is None else masks
        if masks is None:
            return None
        ties, whole = self.ties(), self.whole(masks)
        part = next((family for family in ties if not whole[family]), None)
        return None if part is None else f"its {NAMES[part]} must all be kept, as {ties[part]}"

    def whole(self, masks: tuple[Tensor, ...]) -> dict[str, bool]:
        """For every family whether these masks keep all its units, or no unit at all."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """Every slice of a parameter that belongs to units; what is in none stays whatever is removed."""
        raise NotImplementedError

    def unit_cost(self, family: str) -> UnitCost:
        """What one more unit of a family of `parts` costs in parameters and linear layers."""
        found = [
            (p.parameter.dim(), p.dim, p.parameter.numel() // p.parameter.shape[p.dim])
            for p in self.parts()
            if p.family == family
        ]
        rows, columns = (sum(n for dims, dim, n in found if (dims, dim) == (2, side)) for side in (0, 1))
        return UnitCost(sum(n for _, _, n in found), rows, columns)

    def half_macs(self, tokens: int) -> int:
        """Multiply-accumulates of an image of so many tokens that stay whatever is removed."""
        return 0

    def fixed_params(self) -> int:
        """Parameters that stay whatever is removed."""
        units = sum(p.size * p.parameter.numel() // p.parameter.shape[p.dim] for p in self.parts())
        return sum(p.numel() for p in self.parameters()) - units

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self._masks is None


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of `module` are; the CPU if it has none of its own."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))

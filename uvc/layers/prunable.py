"""What attention and MLPs that can leave parts out have in common: masks, and what is derived from them."""

from typing import Any, Self

import torch
import uvc_kernels
from torch import Tensor, nn

from uvc.layers._surgery import take_over

Kept = uvc_kernels.KeptHeads | uvc_kernels.KeptNeurons


class Prunable(nn.Module):
    """A parent before timm's class, which runs while nothing is removed.

    Bool masks on the CPU are the record of what is kept. The index tensors that ops read follow from them and
    are made where the weights are, whenever they are missing or elsewhere: they are part of no copy or file.
    """

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
        self._packed: list[Tensor | None] | None = None

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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None, "_packed": None}

    def set_recompute(self, on: bool) -> None:
        """Whether the backward pass computes the first product again, of kept rows, instead of keeping it."""
        self._recompute = bool(on)

    def take_packed(self, packed: list[Tensor | None] | None) -> None:
        """Use these packed weights (see `packing`) from now on; None packs in every call."""
        self._packed = packed

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self._masks is None


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of `module` are; the CPU if it has none of its own."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))

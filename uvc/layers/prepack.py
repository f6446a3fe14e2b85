"""The kept weights of all layers packed in one launch, when the first of them is asked for in a pass.

For backends that pack for a vendor GEMM (`uvc_kernels.packs_ahead`), where a launch costs as much as a small
layer. What is faster in full products here, as was measured, does not ask, and is left out from the next pass
on. The gradients of all layers are spread in one launch too, at the end of the backward pass; so where
gradients are reduced while the backward pass still runs (several processes), every layer packs its own.
"""

from collections.abc import Iterator

import torch
import uvc_kernels
from torch import Tensor, nn

from uvc.layers.block import UVCBlock
from uvc.layers.stages import entries_of


class _Pass:
    """What is packed in one pass of the blocks: together what the last pass asked for."""

    def __init__(self, halves: list[nn.Module], dtype: torch.dtype):
        self.dtype, self.grad = dtype, torch.is_grad_enabled()
        self._together = [half for half in halves if half.asks_for_packed]
        self._packed: dict[nn.Module, list[Tensor | None]] = {}

    def packed(self, half: nn.Module) -> list[Tensor | None]:
        """The packed weights of one half."""
        if half in self._together and torch.is_grad_enabled() == self.grad:
            if not self._packed:
                packings = [each.packing() for each in self._together]
                joined = [[entry for packing in packings for entry in packing[i]] for i in range(4)]
                found = iter(uvc_kernels.gather(*joined, self.dtype))
                for each, packing in zip(self._together, packings, strict=True):
                    self._packed[each] = [next(found) for _ in packing[0]]
            return self._packed[half]
        return uvc_kernels.gather(*half.packing(), self.dtype)


class _Share:
    """The packed weights of one half, which are made when they are read."""

    def __init__(self, of: _Pass, half: nn.Module):
        self._of, self._half, self.read = of, half, False

    def __iter__(self) -> Iterator[Tensor | None]:
        self.read = True
        return iter(self._of.packed(self._half))


def pack_ahead(blocks: nn.Sequential) -> None:
    """Make the UVCBlocks in `blocks` pack together whenever `blocks` is called; once is enough."""
    if _pack not in blocks._forward_pre_hooks.values():
        blocks.register_forward_pre_hook(_pack)
        # What was packed serves one pass, finished or not.
        blocks.register_forward_hook(_forget, always_call=True)


def _halves(blocks: nn.Sequential) -> list[nn.Module]:
    halves = []
    for listed in blocks:
        for block in (listed,) if isinstance(listed, UVCBlock) else entries_of(listed):
            if isinstance(block, UVCBlock):
                running = ((block.attn, block.skip_attn), (block.mlp, block.skip_mlp))
                halves += [half for half, off in running if not (off or half.is_dense) and half.reads_weights]
    return halves


def _pack(blocks: nn.Sequential, args: tuple) -> None:
    halves = _halves(blocks)
    if not halves or torch.compiler.is_compiling() or _several_processes():
        return
    weight = halves[0].packing()[0][0]
    kind, dtype = weight.device.type, weight.dtype
    if kind not in ("cpu", "cuda"):
        return
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    if uvc_kernels.packs_ahead(weight.device, dtype):
        one = _Pass(halves, dtype)
        for half in halves:
            half.take_packed(_Share(one, half))


def _forget(blocks: nn.Sequential, *_) -> None:
    for half in _halves(blocks):
        half.take_packed(None)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

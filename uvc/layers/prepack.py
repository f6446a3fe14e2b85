"""The kept weights of all layers packed in one launch, when the forward pass of the blocks begins.

For backends that pack for a vendor GEMM (`uvc_kernels.packs_ahead`), where a launch costs as much as a small
layer. The gradients of all layers are spread in one launch too, at the end of the backward pass; so where
gradients are reduced while the backward pass still runs (several processes), every layer packs its own.
"""

import torch
import uvc_kernels
from torch import nn

from uvc.layers.block import UVCBlock


def pack_ahead(blocks: nn.Sequential) -> None:
    """Make the UVCBlocks in `blocks` pack together whenever `blocks` is called; once is enough."""
    if _pack not in blocks._forward_pre_hooks.values():
        blocks.register_forward_pre_hook(_pack)
        # What was packed serves one pass, finished or not.
        blocks.register_forward_hook(_forget, always_call=True)


def _halves(blocks: nn.Sequential) -> list[nn.Module]:
    halves = []
    for block in blocks:
        if isinstance(block, UVCBlock):
            running = ((block.attn, block.skip_attn), (block.mlp, block.skip_mlp))
            halves += [half for half, off in running if not (off or half.is_dense) and half.reads_weights]
    return halves


def _pack(blocks: nn.Sequential, args: tuple) -> None:
    halves = _halves(blocks)
    if not halves or torch.compiler.is_compiling() or _several_processes():
        return
    packings = [half.packing() for half in halves]
    weight = packings[0][0][0]
    kind, dtype = weight.device.type, weight.dtype
    if kind not in ("cpu", "cuda"):
        return
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    if uvc_kernels.packs_ahead(weight.device, dtype):
        joined = [[entry for packing in packings for entry in packing[i]] for i in range(4)]
        packed = iter(uvc_kernels.gather(*joined, dtype))
        for half, packing in zip(halves, packings, strict=True):
            half.take_packed([next(packed) for _ in packing[0]])


def _forget(blocks: nn.Sequential, *_) -> None:
    for half in _halves(blocks):
        half.take_packed(None)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

"""The providers `cuda` (csrc/cuda on a GPU) and `cuda-host` (the same sources built for the CPU).

On the CPU a machine in plain C++ runs the kernels thread by thread, with their real indexing and arithmetic:
for tests, on request only.
"""

import torch
from torch import Tensor

from . import _dispatch, packed
from .mlp import CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _activate(u: Tensor, gate: Tensor | None, activation: str, a: Tensor) -> None:
    torch.ops.uvc_kernels.cuda_activate(u, gate, CODES[activation], a)


def _activate_backward(
    u: Tensor,
    gate: Tensor | None,
    grad_a: Tensor,
    activation: str,
    a: Tensor,
    grad_u: Tensor,
    grad_gate: Tensor | None,
) -> None:
    code = CODES[activation]
    torch.ops.uvc_kernels.cuda_activate_backward(u, gate, grad_a, code, a, grad_u, grad_gate)


def _pieces() -> packed.Pieces:
    ops = torch.ops.uvc_kernels
    return packed.Pieces(
        gather=ops.cuda_gather.default,
        attention_core=ops.cuda_attention_core.default,
        attention_core_backward=ops.cuda_attention_core_backward.default,
        activate=_activate,
        activate_backward=_activate_backward,
        column_sums=ops.cuda_column_sums.default,
        group_scores=ops.cuda_group_scores.default,
        prox_shrink=ops.cuda_prox_shrink.default,
        turn=ops.cuda_turn.default,
        bias_gradient=ops.cuda_bias_gradient.default,
    )


def built(key: str) -> bool:
    """Whether the extension has the kernels for tensors of this dispatch key, CUDA or CPU."""
    return _dispatch.extension_error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "uvc_kernels::cuda_gather", key
    )


if built("CUDA"):
    packed.provide("cuda", "cuda", DTYPES, _pieces())
if built("CPU"):
    packed.provide("cuda-host", "cpu", (*DTYPES, torch.float64), _pieces())

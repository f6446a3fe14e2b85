"""What the backward passes of all ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def need_bits(needs: Sequence[bool]) -> int:
    """`ctx.needs_input_grad` as one bit per gradient, in order: what a backward op takes."""
    return sum(1 << i for i, need in enumerate(needs) if need)


def asked_for(grads: Sequence[Tensor], needs: int) -> list[Tensor | None]:
    """None in place of the gradients that were not asked for."""
    return [grad if needs >> i & 1 else None for i, grad in enumerate(grads)]


def empty_gradients(tensors: Sequence[Tensor | None], needs: int) -> tuple[Tensor, ...]:
    """Fake outputs of a backward op: like the tensors where asked for, else empty."""
    some = next(t for t in tensors if t is not None)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needs >> i & 1 else some.new_empty(0)
        for i, t in enumerate(tensors)
    )


def forbid_double_backward(op: str) -> None:
    """To be called in the backward pass of `op`: RuntimeError when that pass itself is being recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"uvc_kernels.{op} has no second derivative (create_graph=True); use backend('reference')"
        )

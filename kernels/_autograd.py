"""What the backward passes of attention and MLP share."""

from collections.abc import Callable, Sequence

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


def differentiate(
    name: str, op: str, backward: Callable, leaves: int, constants: int, unused: int | None = None
) -> None:
    """Registers `backward`, an op of (grad, tensors, constants, saved, needs), as the gradient of an op.

    name: that op, of (tensors, a constant, recompute), whose results are its output and what to save. op: its
    public name. leaves: how many of the tensors have gradients. constants: how many of the last two inputs
    `backward` takes. unused: the tensor that it does not take.
    """

    def setup_context(ctx, inputs, output):
        tensors = [t for i, t in enumerate(inputs[:-2]) if i != unused]
        ctx.constants, ctx.tensors = inputs[-2:][:constants], len(tensors)
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        # Else autograd makes zeros as large as what is saved.
        ctx.set_materialize_grads(False)

    def run(ctx, grad, *_):
        inputs = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * inputs
        forbid_double_backward(op)
        needs = need_bits(ctx.needs_input_grad[:leaves])
        kept = ctx.saved_tensors  # once: under gradient checkpointing they can be unpacked but once
        tensors, saved = kept[: ctx.tensors], kept[ctx.tensors :]
        grads = backward(grad, *tensors, *ctx.constants, *saved, needs)
        return *asked_for(grads, needs), *[None] * (inputs - leaves)

    torch.library.register_autograd(name, run, setup_context=setup_context)

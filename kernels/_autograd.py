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


# Tensors that nothing has taken over.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def eager(tensors: Sequence) -> bool:
    """Whether nothing traces, transforms or watches ops: what torch's own ops need not be told of, either."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if type(t) not in _PLAIN and isinstance(t, torch.Tensor):
            return False
    return True


def shortcut(op: str, run: Callable, backward: Callable, leaves: int, registered: Callable) -> Callable:
    """`registered`, an op, or where nothing else needs to see it `run` and `backward`, which are behind it.

    A call through the library costs the host several times what its own Python does. run: of the op's inputs,
    returns its output and what to save; backward: of (grad, inputs, saved, needs); both with None for what
    the op has an empty tensor for.
    """

    class Shortcut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            out, *saved = run(*inputs)
            ctx.constants = inputs[-2:]
            ctx.tensors = len(inputs) - 2
            ctx.save_for_backward(*inputs[:-2], *saved)
            ctx.set_materialize_grads(False)
            return out

        @staticmethod
        def backward(ctx, grad):
            inputs = ctx.tensors + 2
            if grad is None:
                return (None,) * inputs
            forbid_double_backward(op)
            needs = need_bits(ctx.needs_input_grad[:leaves])
            kept = ctx.saved_tensors  # once: under gradient checkpointing they can be unpacked but once
            tensors, saved = kept[: ctx.tensors], kept[ctx.tensors :]
            grads = backward(grad, *tensors, *ctx.constants, *saved, needs)
            return *asked_for(grads, needs), *[None] * (inputs - leaves)

    def call(*inputs):
        if not eager(inputs):
            return registered(*inputs)[0]
        return Shortcut.apply(*inputs) if torch.is_grad_enabled() else run(*inputs)[0]

    return call


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

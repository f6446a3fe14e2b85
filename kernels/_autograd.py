"""What the backward passes of attention and MLP share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def apart() -> torch.autograd.graph.saved_tensors_hooks:
    """For kernels that run inside the caller's forward pass but are no part of it: gradient checkpointing
    counts, and computes again, what its hooks see of a pass.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


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
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if type(t) not in _PLAIN and isinstance(t, torch.Tensor):
            return False
    return True


class Gradient(NamedTuple):
    """The gradient of an op of (tensors, a constant, recompute), which returns its output and what it saves.

    op: its public name. backward: of (grad, tensors, constants, saved, needs). leaves: how many of the
    tensors have gradients. constants: how many of the last two inputs `backward` takes. unused: the tensor
    that it does not take.
    """

    op: str
    backward: Callable
    leaves: int
    constants: int = 2
    unused: int | None = None

    def save(self, ctx, inputs: Sequence, saved: Sequence[Tensor | None]) -> None:
        """What the forward pass keeps."""
        tensors = [t for i, t in enumerate(inputs[:-2]) if i != self.unused]
        ctx.constants, ctx.tensors = inputs[-2:][: self.constants], len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        # Else autograd makes zeros as large as what is saved.
        ctx.set_materialize_grads(False)

    def run(self, ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs."""
        inputs = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * inputs
        forbid_double_backward(self.op)
        needs = need_bits(ctx.needs_input_grad[: self.leaves])
        kept = ctx.saved_tensors  # once: under gradient checkpointing they can be unpacked but once
        tensors, saved = kept[: ctx.tensors], kept[ctx.tensors :]
        grads = self.backward(grad, *tensors, *ctx.constants, *saved, needs)
        return *asked_for(grads, needs), *[None] * (inputs - self.leaves)


def shortcut(gradient: Gradient, run: Callable, registered: Callable) -> Callable:
    """`registered`, an op, or where nothing else needs to see it `run` and `gradient`, which are behind it.

    A call through the library costs the host several times what its own Python does. `run` and the gradient
    may give None for what the op has an empty tensor for.
    """

    class Shortcut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            out, *saved = run(*inputs)
            gradient.save(ctx, inputs, saved)
            return out

        @staticmethod
        def backward(ctx, grad):
            return gradient.run(ctx, grad)

    def call(*inputs):
        if not eager(inputs):
            return registered(*inputs)[0]
        return Shortcut.apply(*inputs) if torch.is_grad_enabled() else run(*inputs)[0]

    return call


def differentiate(name: str, gradient: Gradient) -> None:
    """Registers the gradient of the op `name`."""

    def setup_context(ctx, inputs, output):
        gradient.save(ctx, inputs, output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def run(ctx, grad, *_):
        return gradient.run(ctx, grad)

    torch.library.register_autograd(name, run, setup_context=setup_context)


def of_extension(name: str, leaves: int, unused: int) -> Callable:
    """Registers `name_backward` as the gradient of the extension's op `name`; what calls that for its output.

    The backward pass takes neither `recompute` nor the tensor `unused`.
    """
    registered, backward = (
        getattr(torch.ops.uvc_kernels, f"{name}{end}").default for end in ("", "_backward")
    )
    gradient = Gradient(name, backward, leaves, constants=1, unused=unused)
    differentiate(f"uvc_kernels::{name}", gradient)

    def run(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*inputs)

    return shortcut(gradient, run, registered)

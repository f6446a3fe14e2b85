"""How kernel tests judge an error: against float64, and against plain torch's own error in the same dtype."""

from collections.abc import Callable, Sequence

import torch
import uvc_kernels
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# What rounding may add, relative to the largest entry: torch may hit the exact value; float64 has no judge.
FLOOR = {torch.float32: 5e-7, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def random(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    """Normal numbers that `dtype` holds exactly."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The output and the gradient of every input that is there, under a fixed cotangent."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Rounded to bfloat16, so that every dtype sees the same numbers.
    out.backward(cotangent.bfloat16().to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs if t is not None)]


def check(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    provider: str = "cpu",
) -> None:
    """The kernel's output and gradients are at most twice as wrong as plain torch's in `dtype`."""
    inputs = [None if t is None else t.detach().to(dtype) for t in inputs]
    wide = [None if t is None else t.double() for t in inputs]
    with uvc_kernels.backend("reference"):
        exact, plain = with_gradients(function, wide), with_gradients(function, inputs)
    with uvc_kernels.backend(provider):
        found = with_gradients(function, inputs)
    for i, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        assert a.dtype == dtype and a.shape == c.shape
        if c.numel() == 0:
            continue
        allowed = 2 * (b.double() - c).abs().max() + FLOOR[dtype] * c.abs().max()
        error = (a.double() - c).abs().max()
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"

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


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], seed: int = 1
) -> list[Tensor]:
    """The output and the gradient of every input that is there, under a fixed cotangent."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Rounded to bfloat16, so that every dtype sees the same numbers.
    out.backward(cotangent.bfloat16().to(out))
    return [out.detach(), *(t.grad for t in inputs if t is not None)]


def forced(provider: str, function: Callable) -> Callable:
    """`function` with every op forced to the provider."""

    def run(*tensors):
        with uvc_kernels.backend(provider):
            return function(*tensors)

    return run


def check(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    provider: str = "cpu",
) -> None:
    """The kernel's output and gradients are at most twice as wrong as plain torch's in `dtype`."""
    inputs = [None if t is None else t.detach().to(dtype) for t in inputs]
    wide = [None if t is None else t.double() for t in inputs]
    pooled: list[list[float]] = []  # per result: the kernel's worst error, torch's, the largest entry
    # The error of a handful of numbers is luck, torch's too: then both are judged over several cotangents.
    for seed in range(1, 9):
        with uvc_kernels.backend("reference"):
            exact, plain = with_gradients(function, wide, seed), with_gradients(function, inputs, seed)
        with uvc_kernels.backend(provider):
            found = with_gradients(function, inputs, seed)
        pooled = pooled or [[0.0, 0.0, 0.0] for _ in exact]
        for sums, a, b, c in zip(pooled, found, plain, exact, strict=True):
            assert a.dtype == dtype and a.shape == c.shape
            if c.numel():
                worst = ((a.double() - c), (b.double() - c), c)
                # A NaN must not be lost in a maximum.
                sums[:] = [
                    max(s, t.abs().max().nan_to_num(float("inf")).item())
                    for s, t in zip(sums, worst, strict=True)
                ]
        if min(torch.count_nonzero(c).item() or 64 for c in exact) >= 64:
            break
    for i, (error, usual, largest) in enumerate(pooled):
        allowed = 2 * usual + FLOOR[dtype] * largest
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"

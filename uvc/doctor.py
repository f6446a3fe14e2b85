"""What was built, what runs here, and whether each kernel computes what its float64 reference does."""

import os
import platform
from collections.abc import Callable

import torch
import uvc_kernels
from rich.console import Group
from rich.table import Table
from torch import Tensor
from uvc_kernels import _dispatch

from uvc.run import versions

# Relative error in float32 that a correct kernel stays well below.
TOLERANCE = 1e-4


def diagnosis() -> Group:
    """Two tables for a rich console: versions and machine; every op with every provider."""
    return Group(_machine(), _checks())


def _machine() -> Table:
    table = Table(title="this machine", show_header=False)
    for name, value in versions().items():
        table.add_row(name, value)
    table.add_row(
        "processor", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    )
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("CUDA devices", ", ".join(devices) or "none")
    built = "built" if _dispatch.extension_error is None else f"not built: {_dispatch.extension_error}"
    table.add_row("uvc_kernels._C", built)
    table.add_row("forced backend", os.environ.get("UVC_BACKEND") or "none")
    return table


def _checks() -> Table:
    table = Table(title="self-check: float32 against the float64 reference, outputs and gradients")
    for column in ("backend", *EXAMPLES, "note"):
        table.add_column(column)
    for provider in _dispatch.PROVIDERS:
        results = [_check(example, provider) for example in EXAMPLES.values()]
        notes = [note for _, note in results if note]
        table.add_row(provider, *(verdict for verdict, _ in results), notes[0] if notes else "")
    return table


def _check(example: Callable[[torch.device, torch.dtype], list[Tensor]], provider: str) -> tuple[str, str]:
    """'ok' or 'WRONG' with the worst error, or '-' and why this provider cannot serve here."""
    on_gpu = provider in ("triton", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with uvc_kernels.backend("reference"):
        expected = example(torch.device("cpu"), torch.float64)
    try:
        with uvc_kernels.backend(provider):
            found = example(device, torch.float32)
    except (RuntimeError, ImportError) as error:
        # A forced provider that cannot serve says why after the colon; anything else is a fault.
        _, expected_refusal, reason = str(error).partition("cannot run it: ")
        return ("-", reason) if expected_refusal else ("FAILED", str(error))
    worst = max(_error(a, b) for a, b in zip(found, expected, strict=True))
    return f"{'ok' if worst < TOLERANCE else 'WRONG'} {worst:.0e}", ""


def _error(found: Tensor, expected: Tensor) -> float:
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(float("inf")))


def _tensors(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def _with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def _attention(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _tensors(device, dtype, (2, 17, 24), (72, 24), (72,), (24, 24), (24,))
    mask = torch.arange(24).view(3, 8) % 3 > 0
    mask[1] = False
    kept = uvc_kernels.kept_heads(mask.roll(1, 1).to(device), mask.to(device))
    return _with_gradients(uvc_kernels.attention(*inputs, kept, 8**-0.5), inputs)


def _mlp(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _tensors(device, dtype, (2, 17, 24), (40, 24), (40,), (24, 40), (24,))
    return _with_gradients(uvc_kernels.mlp(*inputs, torch.arange(0, 40, 3, device=device)), inputs)


def _group_scores(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    a, b, c = (tensor.detach() for tensor in _tensors(device, dtype, (12, 20), (12, 20), (12,)))
    return [uvc_kernels.group_scores([a, a, c], [b, b, c], [0, 1, 0])]


def _prox_shrink(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    weights = [tensor.detach() for tensor in _tensors(device, dtype, (12, 20), (12, 20), (12,))]
    factors = torch.linspace(0, 1, 12 + 20 + 12, dtype=torch.float64).to(device, dtype)
    uvc_kernels.prox_shrink(weights, factors, [0, 1, 0])
    return weights


EXAMPLES = {"attention": _attention, "mlp": _mlp, "group_scores": _group_scores, "prox_shrink": _prox_shrink}

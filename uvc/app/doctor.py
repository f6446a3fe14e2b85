"""What was built, what runs here, and whether each kernel computes what its float64 reference does."""

import itertools
import os
import platform
import time

import torch
from rich.console import Group
from rich.table import Table
from uvc_kernels import _dispatch, self_check
from uvc_kernels.timing import milliseconds

from uvc.environment import versions

# Tensor cores multiply 16-bit numbers, so float32 alone would not touch them.
DTYPES = (torch.float32, torch.bfloat16)
PRODUCT, SECONDS = 512, 0.2  # of a square product; of the measurement of one dtype


def diagnosis() -> Group:
    """Tables for a rich console: versions and machine; its matrix products; every op with every provider."""
    return Group(_machine(), _products(), _checks())


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
    chosen, asked = _dispatch.instruction_set(), os.environ.get("UVC_CPU_ISA")
    table.add_row("CPU kernels", (chosen or "not built") + (f", UVC_CPU_ISA={asked}" if asked else ""))
    table.add_row("forced backend", os.environ.get("UVC_BACKEND") or "none")
    return table


def _products() -> Table:
    table = Table(title="matrix products of torch, GFLOP/s")
    for column in ("threads", *map(_name, DTYPES)):
        table.add_column(column)
    threads = torch.get_num_threads()
    try:
        for count in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(count)
            table.add_row(str(count), *(f"{rate(dtype):.0f}" for dtype in DTYPES))
    finally:
        torch.set_num_threads(threads)
    return table


def rate(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of some products of square matrices on the CPU."""
    a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    out, cpu = torch.empty_like(a), torch.device("cpu")
    samples, end = [], time.monotonic() + SECONDS
    # The first of them warms up.
    while len(samples) < 3 or time.monotonic() < end:
        samples.append(milliseconds(lambda: torch.mm(a, b, out=out), cpu))
    return 2 * PRODUCT**3 / (1e6 * min(samples))


def _checks() -> Group:
    table = Table(title="self-check against the float64 reference, outputs and gradients")
    for column in ("op", "dtype", *_dispatch.PROVIDERS):
        table.add_column(column)
    notes = {}
    for op, dtype in itertools.product(self_check.EXAMPLES, DTYPES):
        results = {provider: _check(op, provider, dtype) for provider in _dispatch.PROVIDERS}
        table.add_row(op, _name(dtype), *(verdict for verdict, _ in results.values()))
        notes |= {provider: note for provider, (_, note) in results.items() if note}
    return Group(table, *(f"{provider}: {note}" for provider, note in notes.items()))


def _check(op: str, provider: str, dtype: torch.dtype) -> tuple[str, str]:
    """'ok' or 'WRONG' with the worst error, or '-' and why this provider cannot serve here."""
    on_gpu = provider in ("triton", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        error, share = self_check.errors(op, provider, device, dtype)
    except (RuntimeError, ImportError) as failure:
        # A forced provider that cannot serve says why after the colon; anything else is a fault.
        _, expected_refusal, reason = str(failure).partition("cannot run it: ")
        return ("-", reason) if expected_refusal else ("FAILED", str(failure))
    return f"{'ok' if share <= 1 else 'WRONG'} {error:.0e}", ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

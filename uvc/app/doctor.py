"""What was built, what runs here, and whether each kernel computes what its float64 reference does."""

import itertools
import os
import platform
import time
import warnings
from typing import Any

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


def examine() -> dict[str, Any]:
    """The same as plain data."""
    return {"machine": machine(), "gflops": products(), "self_checks": checks()}


def machine() -> dict[str, str]:
    """Versions, processor, devices and build."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built = "built" if _dispatch.extension_error is None else f"not built: {_dispatch.extension_error}"
    chosen = _dispatch.instruction_set()
    asked = [f"{n}={os.environ[n]}" for n in ("UVC_CPU_ISA", "UVC_CPU_PRODUCTS") if n in os.environ]
    products = ["own products of float32"] if _dispatch.own_products() else []
    return {
        **versions(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "CUDA devices": ", ".join(devices) or "none",
        "uvc_kernels._C": built,
        "CPU kernels": ", ".join([chosen or "not built", *products, *asked]),
        "forced backend": os.environ.get("UVC_BACKEND") or "none",
    }


def products() -> list[dict[str, float]]:
    """GFLOP/s of torch's matrix products by dtype, on one thread and on all."""
    found, threads = [], torch.get_num_threads()
    try:
        for count in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(count)
            found.append({"threads": count, **{_name(dtype): rate(dtype) for dtype in DTYPES}})
    finally:
        torch.set_num_threads(threads)
    return found


def checks() -> list[dict[str, Any]]:
    """Verdict, worst error and remark of every op, dtype and provider."""
    found = []
    for op, dtype, provider in itertools.product(self_check.EXAMPLES, DTYPES, _dispatch.PROVIDERS):
        verdict, error, note = _check(op, provider, dtype)
        row = {"op": op, "dtype": _name(dtype), "provider": provider, "verdict": verdict}
        found.append({**row, "error": error, "note": note})
    return found


def _machine() -> Table:
    table = Table(title="this machine", show_header=False)
    for row in machine().items():
        table.add_row(*row)
    return table


def _products() -> Table:
    table = Table(title="matrix products of torch, GFLOP/s")
    for column in ("threads", *map(_name, DTYPES)):
        table.add_column(column)
    for row in products():
        table.add_row(*(f"{value:.0f}" for value in row.values()))
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
    found = checks()
    for (op, dtype), rows in itertools.groupby(found, lambda row: (row["op"], row["dtype"])):
        cells = (row["verdict"] + ("" if row["error"] is None else f" {row['error']:.0e}") for row in rows)
        table.add_row(op, dtype, *cells)
    notes = {row["provider"]: row["note"] for row in found if row["note"]}
    return Group(table, *(f"{provider}: {note}" for provider, note in notes.items()))


def _check(op: str, provider: str, dtype: torch.dtype) -> tuple[str, float | None, str]:
    """'ok' or 'WRONG' and the worst error, or '-' and why this provider cannot serve here."""
    on_gpu = provider in ("triton", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        with warnings.catch_warnings():
            # The first backward pass on a GPU may find no context there, and makes one.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            error, share = self_check.errors(op, provider, device, dtype)
    except Exception as failure:
        # A forced provider that cannot serve says why after the colon; anything else, as of a compiler or a
        # driver, is a fault.
        _, expected_refusal, reason = str(failure).partition("cannot run it: ")
        return ("-", None, reason) if expected_refusal else ("FAILED", None, str(failure))
    return "ok" if share <= 1 else "WRONG", error, ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

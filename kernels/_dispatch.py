"""Which provider serves an op: the only place that asks for device, dtype and what was built.

Providers are tried in the order of `PROVIDERS` from the fastest; `reference` (plain torch) always works.
`UVC_BACKEND=name` or `with backend(name):` forces one, and then what it cannot do is an error.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .indices import KeptHeads, counts_of
from .warn_once import warn_once

PROVIDERS = ("reference", "cpu", "triton", "cuda", "cuda-host")


class _Implementation(NamedTuple):
    run: Callable
    device: str
    dtypes: frozenset[torch.dtype]
    packs: bool = False  # whether it takes weights that `gather` has packed


_implementations: dict[tuple[str, str], _Implementation] = {}
_loaders: dict[str, Callable[[], object]] = {}
_checks: list[Callable[[str, str, torch.device, torch.dtype], str | None]] = []
_references: dict[str, Callable] = {}
_forced: list[str] = []
_proofs: dict[tuple, bool] = {}


def _load_extension() -> str | None:
    """Load `uvc_kernels._C`; None on success, else the reason."""
    try:
        importlib.import_module("uvc_kernels._C")
    except ImportError as error:
        return str(error)
    return None


extension_error = _load_extension()


def instruction_set() -> str | None:
    """What the CPU kernels run with: avx512_bf16, avx512, avx2 or baseline, no more than UVC_CPU_ISA names;
    None where they are not built.
    """
    if extension_error is not None:
        return None
    return importlib.import_module("uvc_kernels._C").instruction_set()


def own_products() -> bool:
    """Whether the CPU kernels multiply float32 matrices themselves, not by torch's products: on AMD's
    processors with AVX-512, or as UVC_CPU_PRODUCTS (own or vendor) has it.
    """
    return extension_error is None and importlib.import_module("uvc_kernels._C").own_products()


def provide_reference(op: str, run: Callable) -> None:
    """Make `run` the plain-torch implementation of `op`."""
    _references[op] = run


def provide(
    op: str,
    provider: str,
    run: Callable,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    packs: bool = False,
) -> None:
    """Make `run` what `provider` offers for `op` on one device type and these dtypes.

    packs: whether it takes weights that `gather` has packed.
    """
    _implementations[op, provider] = _Implementation(run, device, frozenset(dtypes), packs)


def provide_later(provider: str, load: Callable[[], object]) -> None:
    """Call `load` when `provider` is first asked for; it calls `provide`, or raises ImportError."""
    _loaders[provider] = load


def provide_check(check: Callable[[str, str, torch.device, torch.dtype], str | None]) -> None:
    """Let `check(op, provider, device, dtype)` decide whether a kernel may serve: None, or what is wrong."""
    _checks.append(check)


def is_forced() -> bool:
    """Whether a `with backend(name):` is around this call."""
    return bool(_forced)


def _known(name: str, source: str) -> str:
    if name not in PROVIDERS:
        raise ValueError(f"{source} names the unknown backend {name!r}; use one of {', '.join(PROVIDERS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one provider for every op inside the `with` block; ValueError when `name` is unknown."""
    _forced.append(_known(name, "backend()"))
    try:
        yield
    finally:
        _forced.pop()


def _why_not(op: str, provider: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when `provider` can run `op` on this device and dtype, else the reason."""
    if provider == "reference":
        return None
    if provider in ("cpu", "cuda", "cuda-host") and extension_error is not None:
        return f"the extension uvc_kernels._C is not built ({extension_error}); reinstall with a C++ compiler"
    if (op, provider) not in _implementations and provider in _loaders:
        try:
            _loaders[provider]()
        except ImportError as error:
            return f"{provider} is not installed ({error})"
    implementation = _implementations.get((op, provider))
    if implementation is None:
        return f"this build has no {provider} kernel for {op}"
    if implementation.device != device.type:
        return f"it runs on {implementation.device} tensors, not on {device.type}"
    if dtype not in implementation.dtypes:
        return f"it takes {', '.join(sorted(str(d) for d in implementation.dtypes))}, not {dtype}"
    return None


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on `device`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _proven(op: str, provider: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `provider` passed its self-check on `device`; check and warning come once per process."""
    key = (op, provider, device, dtype)
    if key not in _proofs:
        # A check waits for the device, which a capture forbids; what is not checked yet is not used.
        if capturing(device):
            return False
        faults = (check(op, provider, device, dtype) for check in _checks)
        fault = next((fault for fault in faults if fault is not None), None)
        _proofs[key] = fault is None
        if fault is not None:
            message = f"uvc_kernels.{op}: the {provider} kernel fails its self-check on {device}"
            warnings.warn(f"{message} and is not used: {fault}", RuntimeWarning, stacklevel=5)
    return _proofs[key]


# torch.compile asks while it traces and takes the answer as a constant. This is what
# `torch.compiler.assume_constant_result` does, without its import of the whole compiler.
_proven._dynamo_marked_constant = True


def serves(op: str, provider: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `provider` can run `op` and passed its self-check; the tests alone check cpu kernels."""
    if _why_not(op, provider, device, dtype) is not None:
        return False
    return provider == "cpu" or _proven(op, provider, device, dtype)


def kernel_serves(op: str, device: torch.device, dtype: torch.dtype, kept: KeptHeads | None = None) -> bool:
    """Whether a kernel serves `op` here: the one that the user asked for, or any.

    kept: of what heads; those that pack take none of more than 128 dims.
    """
    name = _forced[-1] if _forced else os.environ.get("UVC_BACKEND") or None
    wide = kept is not None and sum(counts_of(kept)) < len(kept.table)
    found = (p for p in PROVIDERS[1:] if name in (None, p) and serves(op, p, device, dtype))
    return any(not (wide and packs(op, p)) for p in found)


def able(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The providers that can serve `op` and passed their self-check, in the order of preference.

    What no kernel serves goes to `reference`, with one warning.
    """
    found, reasons = [], []
    for provider in reversed(PROVIDERS[1:]):
        # On the CPU Triton is an interpreter and CUDA a host build: for tests, on request.
        if device.type == "cpu" and provider != "cpu":
            continue
        if serves(op, provider, device, dtype):
            found.append(provider)
        elif provider == device.type:
            reasons.append(
                _why_not(op, provider, device, dtype) or "its kernel has not passed the self-check"
            )
    if not found:
        warn_once(
            f"uvc_kernels.{op} runs on plain PyTorch for {dtype} on {device.type}: "
            + (reasons[0] if reasons else f"no kernel serves {device.type} tensors"),
            RuntimeWarning,
        )
    return found or ["reference"]


def select(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the provider that serves `op` for tensors of this device and dtype.

    A forced provider that cannot is a RuntimeError. Of several the first of the order of preference is
    named; attention and MLP may be served by a faster one, or by full products, where that was measured.
    """
    return forced(op, device, dtype) or able(op, device, dtype)[0]


def forced(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The provider that the user asked for; RuntimeError when it cannot serve."""
    name = _forced[-1] if _forced else os.environ.get("UVC_BACKEND") or None
    if name is None:
        return None
    reason = _why_not(op, _known(name, "UVC_BACKEND"), device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for {op} but cannot run it: {reason}")
    return name


def run_of(op: str, provider: str) -> Callable:
    """What `provider` runs for `op`."""
    return _references[op] if provider == "reference" else _implementations[op, provider].run


def packs(op: str, provider: str) -> bool:
    """Whether what `provider` runs for `op` takes weights that `gather` has packed."""
    found = _implementations.get((op, provider))
    return found is not None and found.packs


def implementation(op: str, device: torch.device, dtype: torch.dtype) -> Callable:
    """The callable that `select` stands for."""
    return run_of(op, select(op, device, dtype))


def packs_ahead(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention and MLP here take weights that `gather` has packed for many layers at once."""
    found = _implementations.get(("attention", select("attention", device, dtype)))
    return found is not None and found.packs

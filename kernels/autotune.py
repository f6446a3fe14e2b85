"""Dispatch by measurement: of all ways that can serve a call, the one that was fastest here.

The ways are every proven provider and, beside them, full products (`dense.py`); not these where recomputing
is asked for, as they keep what it would not. A case is
(op, device, dtype, shape, kept fraction in eighths, with or without gradients); a new kept count within an
eighth measures nothing. The first call of a case times all ways on its own tensors, forward and backward, and
what it finds is kept on disk, in $UVC_CACHE_DIR or the user's cache folder, for this device, build and torch.

Nothing is measured, and the order of preference holds, under UVC_MEASURE=0, with a forced backend, while
torch.compile traces, while a CUDA graph is captured, and with torch's deterministic algorithms.
"""

import importlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _dispatch

ROUNDS = 5
# Another way must be faster by this much: below it, timings are noise.
MARGIN = 0.97
# Enough tokens to see a difference; more would only take longer.
TOKENS = {"cpu": 4096, "cuda": 65536}
LARGEST_FILE = 4 * 1024 * 1024

_known: dict[Path, dict[str, dict]] = {}
_variants: dict[tuple[str, str], Callable] = {}


def provide_variant(op: str, name: str, run: Callable) -> None:
    """Let `run` compete with the providers of `op`; it takes any arguments of that op."""
    _variants[op, name] = run


def choose(
    op: str, arguments: Sequence, kept: int, whole: int, case: tuple = (), recompute: bool = False
) -> Callable:
    """What runs `op` for these arguments, of which the first is x; `kept` of `whole` dims or neurons remain.

    case: what else makes a difference to the time; recompute: memory counts, too.
    """
    x = arguments[0]
    name = _dispatch.forced(op, x.device, x.dtype)
    if name is not None:
        return _dispatch.run_of(op, name)
    ways = _dispatch.able(op, x.device, x.dtype)
    if not _measuring(x):
        return _dispatch.run_of(op, ways[0])
    # Batches count by powers of two, everything else as it is.
    tokens = x.shape[:-1].numel()
    eighths = -(-8 * kept // max(whole, 1))
    weights = [tuple(t.shape) for t in arguments[1:] if type(t) is torch.nn.Parameter or type(t) is Tensor]
    fields = (op, x.dtype, tokens.bit_length(), *x.shape[1:], *weights, f"{eighths}/8", *case, recompute)
    fields += ("train" if torch.is_grad_enabled() else "infer", f"{torch.get_num_threads()} threads")
    key = " ".join(str(field) for field in fields)
    path = cache_file(x.device)
    if path not in _known:
        _known[path] = _read(path)
    if key not in _known[path]:
        others = [] if recompute else [name for of, name in _variants if of == op]
        times = _times(op, [*ways, *others], arguments)
        best = min(times, key=times.get)
        way = best if times[best] < MARGIN * times[ways[0]] else ways[0]
        _known[path][key] = {"way": way, "ms": {name: round(ms, 4) for name, ms in times.items()}}
        _write(path)
    way = _known[path][key]["way"]
    # What is in the file may not be what runs now: a kernel that failed its self-check since, say.
    runs = way in ways or (op, way) in _variants
    return _run_of(op, way if runs else ways[0])


def _run_of(op: str, way: str) -> Callable:
    return _variants.get((op, way)) or _dispatch.run_of(op, way)


def _measuring(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or os.environ.get("UVC_MEASURE") == "0":
        return False
    if x.device.type not in TOKENS or not x.numel() or torch.are_deterministic_algorithms_enabled():
        return False
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    # Whoever counts or traces calls must not see those of a measurement.
    return _get_current_dispatch_mode() is None


def _times(op: str, ways: Sequence[str], arguments: Sequence) -> dict[str, float]:
    """The shortest of a few interleaved runs of each way, in milliseconds."""
    x, *rest = arguments
    images = max(1, TOKENS[x.device.type] // max(1, x.shape[:-1].numel() // x.shape[0]))
    train = torch.is_grad_enabled()

    def leaf(t):
        if isinstance(t, list):  # weights packed ahead: a measurement packs its own
            return None
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().requires_grad_(train) if is_float else t

    given = [leaf(t) for t in (x[:images], *rest)]
    leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad]

    def run(way: str) -> float:
        _wait(x.device)
        start = time.perf_counter()
        out = _run_of(op, way)(*given)
        if train:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        _wait(x.device)
        return 1e3 * (time.perf_counter() - start)

    times: dict[str, float] = dict.fromkeys(ways, float("inf"))
    with torch.autocast(x.device.type, enabled=False):
        for round_ in range(ROUNDS + 1):
            for way in ways:
                ms = run(way)
                if round_:  # the first one warms up
                    times[way] = min(times[way], ms)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_file(device: torch.device) -> Path:
    """Where the choices for this device are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("UVC_CACHE_DIR") or Path(base, "uvc"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return folder / f"fastest-{'-'.join(name.lower().split())}.json"


def _build() -> dict[str, str]:
    """What the times depend on besides the case."""
    extension = "none"
    if _dispatch.extension_error is None:
        extension = str(Path(importlib.import_module("uvc_kernels._C").__file__).stat().st_mtime_ns)
    return {"torch": torch.__version__, "extension": extension, "processors": str(os.cpu_count())}


def _read(path: Path) -> dict[str, dict]:
    """The choices in the file; none when it is missing, of another build, or not what `_write` wrote."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            return {}
        content = json.loads(path.read_text())
        choices = content["choices"] if content["build"] == _build() else {}
        return {key: choice for key, choice in choices.items() if isinstance(choice["way"], str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path) -> None:
    # Another process may have measured other cases meanwhile.
    choices = {**_read(path), **_known[path]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"build": _build(), "choices": choices}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        message = f"uvc_kernels: what was measured cannot be kept in {path.parent} ({error.strerror}); "
        _dispatch.warn_once(("cache", path), message + "set UVC_CACHE_DIR to a writable folder")

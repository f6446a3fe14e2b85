"""Dispatch by measurement: of all implementations that can serve a call, the one that was fastest here.

They are the providers that passed their self-check and variants such as full products (`dense.py`); no
variant where recomputing is asked for, as it keeps what recomputing would not. A case is (op, device, dtype,
shape, kept fraction in eighths, with or without gradients); a new kept count within an eighth measures
nothing. The first call of a case times all of them on its own tensors, forward and backward, as in a training
step: with gradients as small as means over a batch give, and with memory that something else has been
through. The first of the order of preference serves unless another is clearly faster in every round but one.
What is found is kept on disk, in $UVC_CACHE_DIR or the user's cache folder, for this processor, build and
torch, for a day.

While torch.compile traces and while a CUDA graph is captured nothing is measured, but what was measured
before decides. A graph takes only what has run before, as loading the code of a kernel would break the
capture. The order of preference decides under UVC_MEASURE=0, with torch's deterministic algorithms, while
torch.export traces, where the traced sizes of x are symbolic, and in traces `by_preference`.
"""

import contextlib
import functools
import importlib
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _autograd, _dispatch
from .gather import gather
from .timing import milliseconds, take_turns
from .warn_once import warn_once

ROUNDS = 7
# What is to replace the first choice must be faster by this much in every round but one: the rest is noise.
MARGIN = 0.95
LASTS = 24 * 3600  # seconds; a choice from a busy moment must not last for ever
GRADIENT = 1e-3
# Bytes that are written before each run, more than most caches hold: in a step other layers come between.
EVICTED = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
# Enough tokens to see a difference; more would only take longer.
TOKENS = {"cpu": 4096, "cuda": 65536}
# Layers that share a launch where weights are packed ahead, in a measurement.
TOGETHER = 8
LARGEST_FILE = 4 * 1024 * 1024

# What serves calls like one before, so that the host does not look everything up again.
_served: dict[tuple, Callable] = {}
_known: dict[Path | None, dict[str, dict]] = {}
_variants: dict[tuple[str, str], Callable] = {}
# What has run in this process, by device and case, and so can be captured in a CUDA graph.
_ran: dict[tuple, set[str]] = {}
# Not empty inside `by_preference`.
_preferring: list[bool] = []


def provide_variant(op: str, name: str, run: Callable) -> None:
    """Let `run` compete with the providers of `op`; it takes any arguments of that op."""
    _variants[op, name] = run


@contextlib.contextmanager
def by_preference() -> Iterator[None]:
    """What torch.compile traces inside takes no measurement, so that one trace serves all kept counts instead
    of one for each eighth.
    """
    _preferring.append(True)
    try:
        yield
    finally:
        _preferring.pop()


def choose(
    op: str,
    arguments: Sequence,
    kept: int,
    whole: int,
    case: tuple = (),
    recompute: bool = False,
    packing: Callable[[Sequence], tuple] | None = None,
) -> Callable:
    """What runs `op` for these arguments, x, weights and others; `kept` of `whole` dims or neurons remain.

    case: what else makes a difference to the time; recompute: memory counts, too. packing: of these weights,
    what `gather` takes; given where weights are packed ahead of the call, many layers at once.
    """
    x, weights, *_ = arguments
    known = None
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if not watched and not _dispatch.is_forced():
        shapes = (None if t is None else t.shape for t in weights)
        known = (op, x.device, x.dtype, x.shape, *shapes, kept, whole, case, recompute)
        known += (
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )
        known += (os.environ.get("UVC_BACKEND"), os.environ.get("UVC_MEASURE"))
        if known in _served:
            return _served[known]
    name = _dispatch.forced(op, x.device, x.dtype)
    if name is not None:
        return _dispatch.run_of(op, name)
    providers = _dispatch.able(op, x.device, x.dtype)
    if not _compares(x):
        return _dispatch.run_of(op, providers[0])
    variants = [] if recompute else [name for of, name in _variants if of == op]
    shapes = [tuple(t.shape) for t in weights if t is not None]
    # By comparisons, so that a trace with symbolic counts serves all counts of an eighth.
    eighths = next(i for i in range(9) if 8 * kept <= i * whole)
    case = (op, x.dtype, tuple(x.shape), *shapes, f"{eighths}/8", *case, recompute, torch.is_grad_enabled())
    name = _recorded(x.device, case)
    if torch.compiler.is_compiling():
        return _run_of(op, name if name in (*providers, *variants) else providers[0])
    ran = _ran.setdefault((x.device, case), set())
    capturing = _dispatch.capturing(x.device)
    if name is None and not capturing:
        with _autograd.apart():
            times = _times(op, [*providers, *variants], arguments, packing)
        name = _record(x.device, case, times, providers[0])
        ran.update(times)
    # What is in the file may not be what runs now: a kernel that failed its self-check since, say.
    if name not in (*providers, *variants):
        name = providers[0]
    if capturing and name not in ran:
        # Variants are plain torch, whose kernels need no loading.
        name = next((other for other in (*providers, *variants) if other in ran), (*variants, name)[0])
    elif not capturing:
        ran.add(name)
        if known is not None:
            _served[known] = _run_of(op, name)
    return _run_of(op, name)


def recall(device: torch.device, key: str) -> str | None:
    """What `remember` kept for this device under a key, in any process; None: nothing that holds."""
    path = cache_file(device)
    if path not in _known:
        _known[path] = _read(path)
    return _known[path].get(key, {}).get("fastest")


def remember(device: torch.device, key: str, found: str) -> None:
    """Keeps another choice that was measured on this device beside those of ops, as long as them."""
    path = cache_file(device)
    _known.setdefault(path, {})[key] = {"fastest": found, "ms": {}, "at": int(time.time())}
    _write(path)


def _run_of(op: str, name: str) -> Callable:
    return _variants.get((op, name)) or _dispatch.run_of(op, name)


def _compares(x: Tensor) -> bool:
    """Whether a measurement decides, be it made now or before."""
    if os.environ.get("UVC_MEASURE") == "0" or torch.are_deterministic_algorithms_enabled():
        return False
    if x.device.type not in TOKENS:
        return False
    if torch.compiler.is_compiling():
        if _preferring:
            return False
        static = torch.fx.experimental.symbolic_shapes.has_static_value
        return not _exporting() and all(static(n) for n in x.shape)
    # A flop counter or a tracer must not see the calls of a measurement.
    return x.numel() > 0 and _get_current_dispatch_mode() is None


def _exporting() -> bool:
    """Whether torch.export traces."""
    return torch.compiler.is_exporting()


# Asked inside a trace, torch 2.10 says yes to torch.compile, too; as a constant it is asked outside.
_exporting._dynamo_marked_constant = True


def _key(case: tuple) -> str:
    return _spelled(case, torch.get_num_threads())


@functools.lru_cache(4096)
def _spelled(case: tuple, threads: int) -> str:
    op, dtype, shape, *fields, grad = case
    # Batches count by powers of two, everything else as it is.
    fields = (op, dtype, torch.Size(shape[:-1]).numel().bit_length(), *shape[1:], *fields)
    fields += ("train" if grad else "infer", f"{threads} threads")
    return " ".join(str(field) for field in fields)


def _recorded(device: torch.device, case: tuple) -> str | None:
    """What was measured to be fastest in this case, now or by another process."""
    path = cache_file(device)
    if path not in _known:
        _known[path] = _read(path)
    return _known[path].get(_key(case), {}).get("fastest")


# A trace takes the answer as a constant; see `_dispatch._proven`.
_recorded._dynamo_marked_constant = True


def _record(device: torch.device, case: tuple, times: dict[str, list[float]], preferred: str) -> str:
    """Keeps these times and returns the fastest, or `preferred` where none is clearly faster."""
    fastest = _fastest(times, preferred)
    path = cache_file(device)
    ms = {name: round(min(samples), 4) for name, samples in times.items()}
    _known.setdefault(path, {})[_key(case)] = {"fastest": fastest, "ms": ms, "at": int(time.time())}
    _write(path)
    return fastest


def _fastest(times: dict[str, list[float]], preferred: str) -> str:
    """The fastest of those clearly faster than `preferred`, else that; from milliseconds by round."""

    def second_worst(name: str) -> float:
        ratios = sorted(ms / first for ms, first in zip(times[name], times[preferred], strict=True))
        return ratios[max(0, len(ratios) - 2)]

    faster = [name for name in times if name != preferred and second_worst(name) < MARGIN]
    return min(faster, key=lambda name: statistics.median(times[name]), default=preferred)


def _times(
    op: str,
    names: Sequence[str],
    arguments: Sequence,
    packing: Callable[[Sequence], tuple] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each implementation in a few rounds.

    Where weights are packed ahead, what packs is timed with packed ones and takes its share of a launch that
    packs `TOGETHER` such layers.
    """
    x, weights, *rest = arguments
    images = max(1, TOKENS[x.device.type] // max(1, x.shape[:-1].numel() // x.shape[0]))
    train = torch.is_grad_enabled()

    def leaf(t):
        return None if t is None else t.detach().requires_grad_(train)

    def some(tensors):
        return [t for t in tensors if t is not None]

    x, weights = leaf(x[:images]), type(weights)(*map(leaf, weights))
    calls = {name: ((x, weights, *rest), some((x, *weights))) for name in names}
    ahead = [] if packing is None else [name for name in names if _dispatch.packs(op, name)]
    if packing is not None:
        lists = packing(weights)
        kept, one, _, *last = rest
        ready = [leaf(t) for t in gather(*lists, x.dtype)] if ahead else None
        for name in names:
            given, of = (ready, ready) if name in ahead else (None, weights)
            calls[name] = (x, weights, kept, one, given, *last), some((x, *of))

    generator = torch.Generator(x.device).manual_seed(0)
    between = torch.empty(EVICTED[x.device.type], dtype=torch.uint8, device=x.device)
    grad: Tensor | None = None

    def run(name: str) -> None:
        nonlocal grad
        given, leaves = calls[name]
        out = _run_of(op, name)(*given)
        if train:
            if grad is None:  # in the first round, which warms up
                grad = torch.empty_like(out).normal_(0.0, GRADIENT, generator=generator)
            torch.autograd.grad(out, leaves, grad)

    def pack() -> None:
        packed = some(gather(*([*entries] * TOGETHER for entries in lists), x.dtype))
        if train:
            torch.autograd.grad(packed, some(lists[0]), [t.detach() for t in packed])

    def timer(name: str) -> float:
        between.fill_(1)
        ms = milliseconds(lambda: run(name), x.device)
        if name in ahead:
            between.fill_(1)
            ms += milliseconds(pack, x.device) / TOGETHER
        return ms

    with torch.autocast(x.device.type, enabled=False):
        return take_turns({name: partial(timer, name) for name in names}, ROUNDS)


def cache_file(device: torch.device) -> Path | None:
    """Where the choices for this device are kept; None for a user who has no home and names no folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {_processor()}"
    return _cache_file(name, *(os.environ.get(at) for at in ("UVC_CACHE_DIR", "XDG_CACHE_HOME", "HOME")))


@functools.lru_cache
def _cache_file(name: str, folder: str | None, base: str | None, home: str | None) -> Path | None:
    try:
        folder = Path(folder) if folder else Path(base or Path.home() / ".cache", "uvc")
    except RuntimeError:
        return None
    return folder / f"fastest-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@functools.cache
def _processor() -> str:
    """What the processor calls itself, with its numbers, as several bear one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = [facts[key] for key in ("model name", "cpu family", "model", "stepping") if key in facts]
    return " ".join(known or [platform.machine(), platform.processor()])


def _build() -> dict[str, str]:
    """What the times depend on besides the case."""
    extension = "none"
    if _dispatch.extension_error is None:
        extension = str(Path(importlib.import_module("uvc_kernels._C").__file__).stat().st_mtime_ns)
    return {
        "torch": torch.__version__,
        "extension": extension,
        "instructions": os.environ.get("UVC_CPU_ISA", ""),
        "products": os.environ.get("UVC_CPU_PRODUCTS", ""),
        "processors": str(os.cpu_count()),
    }


def _read(path: Path | None) -> dict[str, dict]:
    """The choices in the file that still hold; none where it is missing, of another build, or not ours."""
    if path is None:
        return {}
    try:
        if path.stat().st_size > LARGEST_FILE:
            return {}
        content = json.loads(path.read_text())
        choices = content["choices"] if content["build"] == _build() else {}
        return {
            key: choice
            for key, choice in choices.items()
            if isinstance(choice["fastest"], str) and 0 <= time.time() - choice["at"] < LASTS
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path | None) -> None:
    # Another process may have measured other cases meanwhile.
    choices = {**_read(path), **_known[path]}
    try:
        if path is None:
            raise FileNotFoundError(None, "the user has no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"build": _build(), "choices": choices}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        where = "" if path is None else f" in {path.parent}"
        message = f"uvc_kernels: what was measured cannot be kept{where} ({error.strerror}); "
        warn_once(message + "set UVC_CACHE_DIR to a writable folder", RuntimeWarning)

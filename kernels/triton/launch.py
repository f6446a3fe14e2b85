"""What every Triton file shares: element types, rounding, descriptors on the device, gate cases."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENT = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Whether the kernels are decorated under TRITON_INTERPRET=1 and so run on CPU tensors.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The interpreter also takes float64, so that gradients can be checked by differences.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, *((torch.float64,) if INTERPRETED.value else ()))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    # x in a narrower type, rounded to nearest even; the interpreter (of Triton 3.9) truncates to bfloat16.
    if INTERPRETED:
        if dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def eights(n):
    # n, a multiple of 8, in a form that tells the compiler so: it then moves 16 bytes at a time.
    return n // 8 * 8


# Pinned memory, which a capture may not ask for: made in the calls before one, by its size, and kept by those
# that take it.
_spare: dict[int, list[Tensor]] = {}
_captured: list[Tensor] = []
SPARE = 64  # of each size


class Tile(NamedTuple):
    """Rows and columns of a matrix that a program handles at once."""

    rows: int
    columns: int


class Case(NamedTuple):
    """One configuration that a launcher can choose: what the compile gate compiles."""

    kernel: triton.JITFunction
    label: str
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[bool, dict[str, int]] | None = None  # of NVIDIA (False) and of AMD (True)
    tensor_cores: bool = False  # whether it multiplies 16-bit tiles
    targets: tuple[str, ...] = ()  # where it is chosen at all; everywhere when empty


def wide(dtype: torch.dtype) -> tl.dtype:
    """What kernels accumulate in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def to_device(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """A list of numbers on the device by one copy that the host does not wait for."""
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def tiles_of(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [sum(counts), 2]: matrix and tile within it, for each program of a launch over many matrices."""
    return to_device(
        [n for i, count in enumerate(counts) for tile in range(count) for n in (i, tile)], device
    )


@functools.lru_cache(maxsize=1024)
def _addresses(fields: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return to_device([n for row in fields for n in row], device, torch.int64)


def addresses(fields: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 [matrices * fields]: pointers and sizes; copied again only when one of them changes.

    In a capture, RuntimeError where no call before it had as many of them.
    """
    if device.type != "cuda":
        return _addresses(fields, device)
    numbers = [n for row in fields for n in row]
    spare = _spare.setdefault(len(numbers), [])
    if not torch.cuda.is_current_stream_capturing():
        if len(spare) < SPARE:
            spare.append(_pinned(len(numbers)))
        return _addresses(fields, device)
    if not spare:
        raise RuntimeError("a CUDA graph is captured of ops that have not run before; run the step first")
    # A graph copies again at every replay, so what it copies from is kept, and nobody else may use the copy.
    host = spare.pop()
    host.copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    _captured.append(host)
    return host.to(device, non_blocking=True)


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)

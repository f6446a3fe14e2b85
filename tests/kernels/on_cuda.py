"""Where the tests of csrc/cuda run: the host build on the CPU always, the CUDA build where there is a GPU."""

import ctypes
import mmap

import pytest
import torch
from uvc_kernels import cuda

if not cuda.built("CPU"):
    pytest.skip("the extension is not built", allow_module_level=True)

PROVIDERS = {"cuda-host": "cpu"}
if torch.cuda.is_available() and cuda.built("CUDA"):
    PROVIDERS["cuda"] = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(provider, dtype) for provider in PROVIDERS for dtype in DTYPES] + [("cuda-host", torch.float64)]
ops = torch.ops.uvc_kernels
on_every_type = pytest.mark.parametrize(("provider", "dtype"), CASES, ids=lambda value: str(value))
on_every_build = pytest.mark.parametrize("device", PROVIDERS.values(), ids=PROVIDERS.keys())


def statistics(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# What lies behind the outputs that a test has made: nothing may write there.
_behind: list[torch.Tensor] = []
FENCE = 64


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """NaN wherever a kernel forgets to write; behind it lies what `fenced` looks at."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + FENCE,), float("nan"), dtype=dtype, device=device)
    whole[count:] = 77.0
    _behind.append(whole[count:])
    return whole[:count].view(shape)


@pytest.fixture(autouse=True)
def fenced():
    """No kernel of the test wrote behind its outputs."""
    _behind.clear()
    yield
    assert all((fence == 77.0).all() for fence in _behind)


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU whose last byte is followed by memory that nobody may touch."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + room), page, 0) == 0
    place = (ctypes.c_char * size).from_address(address + room - size)
    place.memory = memory  # as long as the tensor lives
    return torch.frombuffer(place, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

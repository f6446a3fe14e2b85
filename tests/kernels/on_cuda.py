"""Where the tests of csrc/cuda run: the host build on the CPU always, the CUDA build where there is a GPU."""

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


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """NaN wherever a kernel forgets to write."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)

"""In which dtypes ops compute, save and sum."""

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and log-sum-exps are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the cpu ops compute in and save: float32 for float16, which CPUs store but hardly multiply."""
    return torch.float32 if dtype == torch.float16 else dtype


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast gives the input of a linear layer; unchanged outside autocast."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in `dtype`."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def check_dtypes(op: str, x: Tensor, *weights: Tensor | None) -> None:
    """ValueError unless the weights have the dtype of x; under autocast they may stay as they are."""
    other = next((w.dtype for w in weights if w is not None and w.dtype != x.dtype), None)
    if other is not None and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{op}: x and the weights must have one dtype outside autocast, got {x.dtype} and {other}"
        )

"""What the layers share: taking over a timm module in place, saying a fallback once, following autocast."""

import warnings
from functools import lru_cache
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def take_over(cls: type[M], module: nn.Module) -> M:
    """A `cls` that owns the very parameters, children, hooks and training flag of `module`, which is left behind."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    return new


@lru_cache(maxsize=None)
def say_once(message: str) -> None:
    """Warn, once per process and message."""
    warnings.warn(message, stacklevel=4)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the dtype that autocast would give a linear layer; unchanged outside autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)

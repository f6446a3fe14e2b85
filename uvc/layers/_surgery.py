"""What the layers share: taking a module over, copying one without weights, saying a thing once."""

import copy
import warnings
from typing import TypeVar

import torch
from torch import nn

said: set[str] = set()

M = TypeVar("M", bound=nn.Module)


def take_over(cls: type[M], module: nn.Module) -> M:
    """A `cls` that owns the parameters, children, hooks and mode of `module`, which is left behind."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    return new


def hollow(module: M, memo: dict[int, object] | None = None) -> M:
    """A copy of `module` on the meta device that holds no weights; `memo` as for `copy.deepcopy`."""
    memo = {} if memo is None else memo
    for tensor in (*module.parameters(), *module.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(module, memo)


# Outside compiled graphs, as a trace cannot warn.
@torch.compiler.disable
def say_once(message: str) -> None:
    """Warn, once per process and message."""
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=4)

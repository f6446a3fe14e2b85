"""What the layers share: taking a module over, and copying one without weights."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def take_over(cls: type[M], module: nn.Module) -> M:
    """A `cls` that owns the parameters, children, hooks and mode of `module`, which is left behind."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    return new


def meta_copy(module: M, memo: dict[int, object] | None = None) -> M:
    """A copy of `module` on the meta device that holds no weights; `memo` as for `copy.deepcopy`."""
    memo = {} if memo is None else memo
    for tensor in (*module.parameters(), *module.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(module, memo)


def like(blocks: nn.Sequential | nn.ModuleList, others: Sequence[nn.Module]) -> nn.Module:
    """Other blocks in the kind of list that `blocks` is, under the same names."""
    if not isinstance(blocks, nn.Sequential):
        return nn.ModuleList(others)
    return nn.Sequential(OrderedDict(zip(blocks._modules, others, strict=False)))

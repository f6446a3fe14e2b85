"""What is left of linear layers after compaction, kept rows and columns, and of what is around them.

B batch, N tokens, D width.
"""

import copy

import torch
from torch import Tensor, nn

from uvc.layers.children import is_plain, is_untouched
from uvc.layers.columns import Columns, columns_of

PADDING = -1  # in the place of a row: zeros


def after(start: int, rows: list[int]) -> list[int]:
    """Rows counted from `start` on."""
    return [row if row == PADDING else start + row for row in rows]


def select(tensor: Tensor, dim: int, index: list[int]) -> Tensor:
    """A copy of the given rows or columns, zeros for padding, detached; frozen if `tensor` is."""
    index = torch.tensor(index, dtype=torch.int64, device=tensor.device)
    kept = tensor.detach().index_select(dim, index.clamp_min(0))
    kept.movedim(dim, 0)[index == PADDING] = 0
    return nn.Parameter(kept, requires_grad=tensor.requires_grad)


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of this weight and bias."""
    # Made with one feature on meta and filled after, as torch's initialisation warns about zero features.
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def smaller(
    dense: nn.Linear | Columns, rows: list[int] | None = None, columns: list[int] | None = None
) -> nn.Linear:
    """A copy of the given rows, or columns, of `dense`; without columns the bias stays."""
    if rows is not None:
        bias = None if dense.bias is None else select(dense.bias, 0, rows)
        return linear_of(select(dense.weight, 0, rows), bias)
    bias = dense.bias
    bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    weight, first = columns_of(dense)
    return linear_of(select(weight, 1, after(first, columns)), bias)


def without_inputs(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer without inputs adds to every token of x [B, N, D]."""
    if not is_plain(linear):
        return linear(x.new_zeros(*x.shape[:-1], 0))
    # The bias alone, as exported programs do not take matrices without columns.
    out = x.new_zeros(*x.shape[:-1], linear.out_features)
    return out if linear.bias is None else out + linear.bias


def passes_on(module: nn.Module) -> bool:
    """Whether a module gives what it gets, in training too, and nobody watches it do so."""
    drops_nothing = type(module) is nn.Dropout and module.p == 0.0
    return (type(module) is nn.Identity or drops_nothing) and is_untouched(module)


def take_parts(new: nn.Module, dense: nn.Module, *names: str) -> None:
    """Copies of the children of `dense` that do something: calling one takes as long as a small product."""
    for name in names:
        if (part := dense._modules.get(name)) is not None and not passes_on(part):
            new.add_module(name, copy.deepcopy(part))


def through_part(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """x through the child of this name, where there is one."""
    part = layer._modules.get(name)
    return x if part is None else part(x)

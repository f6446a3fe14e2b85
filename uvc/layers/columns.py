"""Columns of a linear layer that others have a part in, too.

B batch, N tokens, D width.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from uvc.layers.children import is_plain, watched


class Columns(NamedTuple):
    """`in_features` columns of the layer `whole` from `first` on, as a layer, with its bias or none."""

    whole: nn.Module
    first: int
    in_features: int
    biased: bool

    @property
    def weight(self) -> Tensor:
        """These columns, in place."""
        return self.whole.weight[:, self.first : self.first + self.in_features]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, where it is theirs."""
        return self.whole.bias if self.biased else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, N, in_features] -> [B, N, D]."""
        whole, last = self.whole, self.first + self.in_features
        if is_plain(whole) and not watched():
            return F.linear(x, self.weight, self.bias)
        out = whole(F.pad(x, (self.first, whole.in_features - last)))
        return out if self.biased else out - whole(x.new_zeros(1, whole.in_features))


def columns_of(linear: nn.Module | Columns) -> tuple[nn.Parameter, int]:
    """The weight that holds the columns of a layer, and the first of them."""
    return (linear.whole.weight, linear.first) if isinstance(linear, Columns) else (linear.weight, 0)

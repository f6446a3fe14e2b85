"""The weights of a layer, whole or packed, as the functions of this package hand them on.

D width, Dout width of the output, H heads, K head dim, A = H*K, F hidden.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

# What `gather` made of a layer's weights, where several layers are packed at once; made when it is read.
Packed = Iterable[Tensor | None] | None


class AttentionWeights(NamedTuple):
    """qkv_weight [3A, D] (rows q, k, v), qkv_bias [3A], proj_weight [Dout, A], proj_bias [Dout]."""

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None


class MlpWeights(NamedTuple):
    """fc1_weight and gate_weight [F, D], their biases [F], fc2_weight [Dout, F], fc2_bias [Dout]."""

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None

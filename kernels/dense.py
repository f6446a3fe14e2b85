"""Full products with zeros where something is removed: no work is saved, and none is spent on packing.

    attention: q, v of removed dims are zero;  mlp: activations of removed neurons are zero

What serves a nearly whole structure where measurement (`autotune.py`) finds it faster; not a backend.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from . import _dtypes, autotune
from .indices import KeptHeads, KeptNeurons
from .mlp import ACTIVATIONS


def attention_dense(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
    packed: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
) -> Tensor:
    """`uvc_kernels.attention`."""
    B, N, _ = x.shape
    H, K = kept.whole_columns.shape
    weight, bias, proj, proj_bias = _dtypes.cast(x.dtype, qkv_weight, qkv_bias, proj_weight, proj_bias)
    on = kept.whole_rows >= 0
    # Without its q a removed dim adds nothing to a score, and its k gets no gradient.
    q, k, v = F.linear(x, weight, bias).view(B, N, 3, H, K).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q * on[0], k, v * on[2]))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(B, N, H * K)
    return F.linear(out, proj, proj_bias)


def mlp_dense(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    kept: KeptNeurons,
    activation: str,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    packed: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
) -> Tensor:
    """`uvc_kernels.mlp`."""
    act = ACTIVATIONS[activation]
    hidden = F.linear(x, *_dtypes.cast(x.dtype, fc1_weight, fc1_bias))
    if gate_weight is None:
        hidden = act(hidden)
    else:
        hidden = act(F.linear(x, *_dtypes.cast(x.dtype, gate_weight, gate_bias))) * hidden
    return F.linear(hidden * (kept.whole >= 0), *_dtypes.cast(x.dtype, fc2_weight, fc2_bias))


autotune.provide_variant("attention", "dense", attention_dense)
autotune.provide_variant("mlp", "dense", mlp_dense)

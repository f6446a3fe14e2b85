"""Full products with zeros where something is removed: no work is saved, and none is spent on packing.

    attention: q, v of removed dims are zero;  mlp: activations of removed neurons are zero

A variant, not a backend: it runs where `autotune.py` measures it to be faster, as with few groups removed.
"""

import torch.nn.functional as F
from torch import Tensor

from . import _dtypes, autotune
from .indices import KeptHeads, KeptNeurons
from .mlp import ACTIVATIONS
from .weights import AttentionWeights, MlpWeights, Packed


def attention_dense(
    x: Tensor, weights: AttentionWeights, kept: KeptHeads, scale: float, packed: Packed, recompute: bool
) -> Tensor:
    """`uvc_kernels.attention`."""
    B, N, _ = x.shape
    H, K = kept.whole_columns.shape
    weight, bias, proj, proj_bias = _dtypes.cast(x.dtype, *weights)
    on = kept.whole_rows >= 0
    # Without its q a removed dim adds nothing to a score, and its k gets no gradient.
    q, k, v = F.linear(x, weight, bias).view(B, N, 3, H, K).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q * on[0], k, v * on[2]))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(B, N, H * K)
    return F.linear(out, proj, proj_bias)


def mlp_dense(
    x: Tensor, weights: MlpWeights, kept: KeptNeurons, activation: str, packed: Packed, recompute: bool
) -> Tensor:
    """`uvc_kernels.mlp`."""
    w, act = MlpWeights(*_dtypes.cast(x.dtype, *weights)), ACTIVATIONS[activation]
    hidden = F.linear(x, w.fc1_weight, w.fc1_bias)
    hidden = act(hidden) if w.gate_weight is None else act(F.linear(x, w.gate_weight, w.gate_bias)) * hidden
    return F.linear(hidden * (kept.whole >= 0), w.fc2_weight, w.fc2_bias)


autotune.provide_variant("attention", "dense", attention_dense)
autotune.provide_variant("mlp", "dense", mlp_dense)

"""Multi-head attention that reads and multiplies kept rows only.

    q_h = x Wq[Q_h]^T + bq[Q_h],   k_h = x Wk[Q_h]^T + bk[Q_h],   v_h = x Wv[V_h]^T + bv[V_h]
    out = sum_h softmax(scale q_h k_h^T) v_h Wproj[:, V_h]^T + bproj

h runs over the kept heads, Q_h over the kept q/k dims of head h, V_h over its kept v dims.
B batch, N tokens, D width, H heads, K head dim, A = H*K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _dispatch, _dtypes, autotune
from .indices import KeptHeads, align, all_of, along
from .weights import AttentionWeights, Packed


def attention_reference(
    x: Tensor, weights: AttentionWeights, kept: KeptHeads, scale: float, packed: Packed, recompute: bool
) -> Tensor:
    """The formula in plain torch, any dtype and device, differentiable."""
    qkv_weight, qkv_bias, proj_weight, proj_bias = weights
    A = proj_weight.shape[1]
    rows = torch.cat([kept.qk, kept.qk + A, kept.v + 2 * A])
    weight, proj, proj_bias = _dtypes.cast(
        x.dtype, qkv_weight.index_select(0, rows), proj_weight.index_select(1, kept.v), proj_bias
    )
    bias = None if qkv_bias is None else qkv_bias.index_select(0, rows).to(x.dtype)
    qkv = F.linear(x, weight, bias)
    q, k, v = qkv.split([len(kept.qk), len(kept.qk), len(kept.v)], -1)
    q_cut, v_cut = kept.qk_offsets.tolist(), kept.v_offsets.tolist()
    heads = [v[..., :0]]
    for h in range(len(v_cut) - 1):
        q_h, k_h = (t[..., q_cut[h] : q_cut[h + 1]] for t in (q, k))
        weights = (scale * q_h @ k_h.transpose(-2, -1)).softmax(-1)  # [B, N, N]
        heads.append(weights @ v[..., v_cut[h] : v_cut[h + 1]])
    return F.linear(torch.cat(heads, -1), proj, proj_bias)


_dispatch.provide_reference("attention", attention_reference)


def fake(x, *arguments):
    weights = AttentionWeights(*arguments[:4])
    # torch leaves out the last argument where it has its default.
    qk, _, v, v_offsets, _, recompute = (*arguments[4:], False)[:6]
    B, N, _ = x.shape
    dtype = _dtypes.cpu_dtype(x.dtype)
    return (
        x.new_empty(B, N, weights.proj_weight.shape[0]),
        x.new_empty(0 if recompute else 2 * qk.shape[0] + v.shape[0], B * N, dtype=dtype),
        x.new_empty(align(v.shape[0]), B * N, dtype=dtype),
        x.new_empty(v_offsets.shape[0] - 1, 2, B * N, dtype=_dtypes.statistics_dtype(x.dtype)),
    )


def fake_backward(grad, x, qkv_weight, qkv_bias, proj_weight, *rest):
    qkv_bias, proj_bias = qkv_weight.new_empty(len(qkv_weight)), proj_weight.new_empty(len(proj_weight))
    return _autograd.empty_gradients((x, qkv_weight, qkv_bias, proj_weight, proj_bias), rest[-1])


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::attention", fake)
    torch.library.register_fake("uvc_kernels::attention_backward", fake_backward)
    # The backward pass needs no proj_bias.
    _call = _autograd.of_extension("attention", 5, unused=4)

    def _cpu(
        x: Tensor, weights: AttentionWeights, kept: KeptHeads, scale: float, packed: Packed, recompute: bool
    ) -> Tensor:
        return _call(x, *weights, *kept[1:5], scale, recompute)

    _dispatch.provide("attention", "cpu", _cpu, "cpu", _dtypes.CPU_DTYPES)


def attention_packing(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
) -> tuple[list[Tensor | None], list[Tensor], list[Tensor], list[int]]:
    """What `gather` is to pack of one layer, in the order of `attention(packed=)`."""
    whole_rows, whole_columns = kept.whole_rows.view(-1), kept.whole_columns.view(-1)
    # The output's bias stays whole; it comes along to be cast.
    every = all_of(proj_weight.shape[0], proj_weight.device)
    return (
        [qkv_weight, qkv_bias, proj_weight, along(proj_bias, proj_weight)],
        [kept.rows, kept.rows, kept.columns, every],
        [whole_rows, whole_rows, whole_columns, every],
        [0, 0, 1, 0],
    )


def check_shapes(x: Tensor, qkv_weight: Tensor, proj_weight: Tensor, kept: KeptHeads) -> None:
    """ValueError unless x, weights and what is kept fit one another."""
    if x.dim() != 3:
        raise ValueError(f"attention: x must be [batch, tokens, width], got shape {tuple(x.shape)}")
    if qkv_weight.shape != (3 * proj_weight.shape[1], x.shape[2]):
        raise ValueError(
            f"attention: qkv_weight must be [{3 * proj_weight.shape[1]}, {x.shape[2]}] to fit x and "
            f"proj_weight, got {tuple(qkv_weight.shape)}"
        )
    if kept.whole_columns.numel() != proj_weight.shape[1]:
        raise ValueError(
            f"attention: kept is of {kept.whole_columns.numel()} dims, but proj_weight has "
            f"{proj_weight.shape[1]}"
        )


def attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
    packed: Packed = None,
    recompute: bool = False,
) -> Tensor:
    """Attention over the kept heads and dims.

    x [B, N, D], qkv_weight [3A, D] (rows q, k, v), qkv_bias [3A] or None, proj_weight [Dout, A],
    proj_bias [Dout] or None, all of one floating dtype (autocast casts as for a linear layer, but only what
    is kept). packed: what `gather` made of `attention_packing`, where several layers are packed at once.
    recompute: multiply for q, k and v again in the backward pass instead of keeping them. Returns
    [B, N, Dout] in the dtype of x. Gradients are full-size, zero where removed. Zero kept heads leave the
    bias alone. ValueError on shapes that do not fit.
    """
    check_shapes(x, qkv_weight, proj_weight, kept)
    weights = AttentionWeights(qkv_weight, qkv_bias, proj_weight, proj_bias)
    _dtypes.check_dtypes("attention", x, *weights)
    x = _dtypes.autocast(x)
    arguments = x, weights, kept, scale, packed, recompute
    dims = kept.qk.shape[0] + kept.v.shape[0], 2 * proj_weight.shape[1]
    packing = None if packed is None else lambda w: attention_packing(*w, kept)
    case = kept.whole_columns.shape
    run = autotune.choose("attention", arguments, *dims, case=case, recompute=recompute, packing=packing)
    return run(*arguments)

"""Multi-head attention that reads and multiplies kept rows only.

    q_h = x Wq[Q_h]^T + bq[Q_h],   k_h = x Wk[Q_h]^T + bk[Q_h],   v_h = x Wv[V_h]^T + bv[V_h]
    out = sum_h softmax(scale q_h k_h^T) v_h Wproj[:, V_h]^T + bproj

h runs over the kept heads, Q_h over the kept q/k dims of head h, V_h over its kept v dims.
B batch, N tokens, D width, H heads, K head dim, A = H*K.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch


class KeptHeads(NamedTuple):
    """The kept positions in 0..A of q/k dims and of v dims, head by head, ascending; int64, on x's device.

    `qk_offsets` and `v_offsets` [h + 1] cut the lists `qk` and `v` by kept head; they start at 0.
    """

    qk: Tensor
    qk_offsets: Tensor
    v: Tensor
    v_offsets: Tensor


def kept_heads(qk_mask: Tensor, v_mask: Tensor) -> KeptHeads:
    """The index form of two bool masks [H, K] (True = kept).

    A head is kept when it has a kept v dim; the q/k dims of other heads are dropped. ValueError on masks of
    another shape or dtype.
    """
    if qk_mask.dim() != 2 or qk_mask.shape != v_mask.shape or {qk_mask.dtype, v_mask.dtype} != {torch.bool}:
        raise ValueError(
            "kept_heads takes two bool masks of one shape [heads, head_dim]; got "
            f"{qk_mask.dtype} {tuple(qk_mask.shape)} and {v_mask.dtype} {tuple(v_mask.shape)}"
        )
    K = v_mask.shape[1]
    heads = v_mask.any(1).nonzero().squeeze(1)
    cut = []
    for mask in (qk_mask, v_mask):
        kept = mask[heads]
        row, dim = kept.nonzero(as_tuple=True)
        cut += [heads[row] * K + dim, F.pad(kept.sum(1).cumsum(0), (1, 0))]
    return KeptHeads(*cut)


def attention_reference(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
) -> Tensor:
    """The formula in plain torch, any dtype and device, differentiable."""
    A = proj_weight.shape[1]
    rows = torch.cat([kept.qk, kept.qk + A, kept.v + 2 * A])
    bias = None if qkv_bias is None else qkv_bias.index_select(0, rows)
    qkv = F.linear(x, qkv_weight.index_select(0, rows), bias)
    q, k, v = qkv.split([len(kept.qk), len(kept.qk), len(kept.v)], -1)
    q_cut, v_cut = kept.qk_offsets.tolist(), kept.v_offsets.tolist()
    heads = [v[..., :0]]
    for h in range(len(v_cut) - 1):
        q_h, k_h = (t[..., q_cut[h] : q_cut[h + 1]] for t in (q, k))
        weights = (scale * q_h @ k_h.transpose(-2, -1)).softmax(-1)  # [B, N, N]
        heads.append(weights @ v[..., v_cut[h] : v_cut[h + 1]])
    return F.linear(torch.cat(heads, -1), proj_weight.index_select(1, kept.v), proj_bias)


_dispatch.provide_reference("attention", attention_reference)


def _attention_cpu(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
) -> Tensor:
    return torch.ops.uvc_kernels.attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, *kept, scale)[0]


def _fake(x, qkv_weight, qkv_bias, proj_weight, proj_bias, qk, qk_offsets, v, v_offsets, scale):
    B, N, _ = x.shape
    stats = x.new_empty(v_offsets.shape[0] - 1, 2, B * N, dtype=_dispatch.statistics_dtype(x.dtype))
    return (
        x.new_empty(B, N, proj_weight.shape[0]),
        x.new_empty(2 * qk.shape[0] + v.shape[0], B * N),
        x.new_empty(v.shape[0], B * N),
        stats,
    )


def _fake_backward(grad, x, qkv_weight, qkv_bias, proj_weight, *rest):
    A = proj_weight.shape[1]
    shapes = (x.shape, qkv_weight.shape, (3 * A,), proj_weight.shape, (proj_weight.shape[0],))
    return _dispatch.empty_gradients(x, shapes, rest[-1])


def _setup_context(ctx, inputs, output):
    x, qkv_weight, qkv_bias, proj_weight, _, *kept, scale = inputs
    ctx.save_for_backward(x, qkv_weight, qkv_bias, proj_weight, *kept, *output[1:])
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    x, qkv_weight, qkv_bias, proj_weight, *kept, qkv, heads, stats = ctx.saved_tensors
    _dispatch.forbid_double_backward("attention")
    needs = _dispatch.need_bits(ctx.needs_input_grad[:5])
    grads = torch.ops.uvc_kernels.attention_backward(
        grad, x, qkv_weight, qkv_bias, proj_weight, *kept, ctx.scale, qkv, heads, stats, needs
    )
    return *_dispatch.asked_for(grads, needs), None, None, None, None, None


if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::attention", _fake)
    torch.library.register_fake("uvc_kernels::attention_backward", _fake_backward)
    torch.library.register_autograd("uvc_kernels::attention", _backward, setup_context=_setup_context)
    _dispatch.provide("attention", "cpu", _attention_cpu, "cpu", _dispatch.CPU_DTYPES)


def attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
) -> Tensor:
    """Attention over the kept heads and dims.

    x [B, N, D], qkv_weight [3A, D] (rows q, k, v), qkv_bias [3A] or None, proj_weight [Dout, A],
    proj_bias [Dout] or None, all of one floating dtype (autocast applies as to a linear layer). Returns
    [B, N, Dout] in that dtype. Gradients are full-size, zero where removed. Zero kept heads leave the bias
    alone. ValueError on shapes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"attention: x must be [batch, tokens, width], got shape {tuple(x.shape)}")
    if qkv_weight.shape != (3 * proj_weight.shape[1], x.shape[2]):
        raise ValueError(
            f"attention: qkv_weight must be [{3 * proj_weight.shape[1]}, {x.shape[2]}] to fit x and "
            f"proj_weight, got {tuple(qkv_weight.shape)}"
        )
    x, qkv_weight, qkv_bias, proj_weight, proj_bias = _dispatch.autocast(
        x, qkv_weight, qkv_bias, proj_weight, proj_bias
    )
    run = _dispatch.implementation("attention", x.device, x.dtype)
    return run(x, qkv_weight, qkv_bias, proj_weight, proj_bias, kept, scale)

"""Attention over kept heads and dims in which positions turn q and k, or add to the scores.

    q'_h = R q_h,   k'_h = R k_h
    out = sum_h softmax(scale q'_h k'_h^T + bias_h) v_h Wproj[:, V_h]^T + bproj

q_h, k_h and v_h as in `attention.py`; R turns pairs of dims: (a, b) -> (a cos - b sin, b cos + a sin).
B batch, N tokens, D width, H heads, K head dim, A = H*K; h kept heads, Q kept q/k dims.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _dispatch, _dtypes
from .attention import check_shapes, fake, fake_backward
from .indices import KeptHeads
from .weights import AttentionWeights

OP = "attention_with_positions"
UNIT = 16  # rows of tables have a multiple of it (csrc/cpu/loops.h)


class Positions(NamedTuple):
    """What positions do.

    turn [2, I, G, K, N up to a multiple of 16]: the cosine, and the sine, negative for the first dim of a
    pair, by image (I = B or 1) and head (G = H or 1), without gradient; partner [K] (int64): the dim that
    each is turned with. bias [P, h, N, N] or [P, 1, N, N]: added to the scores, that of image i is i % P.
    None: nothing is turned, or added.
    """

    turn: Tensor | None = None
    partner: Tensor | None = None
    bias: Tensor | None = None


def turn_of(sine: Tensor, cosine: Tensor, partner: Tensor, first: int = 0) -> Tensor:
    """`Positions.turn` of tables [(I,) (G,) N', K]; the `first` tokens, in front of these, are not turned."""
    # In which dims of a pair the sine is negative: those that come before the other one.
    signs = torch.where(torch.arange(len(partner), device=partner.device) < partner, -1.0, 1.0)
    tables = torch.stack([cosine, sine * signs.to(sine)])
    tables = tables.view(2, *[1] * (5 - tables.dim()), *tables.shape[1:]).transpose(-1, -2)
    end = first + tables.shape[-1]
    turn = tables.new_zeros(*tables.shape[:-1], -(-end // UNIT) * UNIT)
    turn[0, ..., :first] = 1.0
    turn[..., first:end] = tables
    return turn


def _turned(t: Tensor, turn: Tensor, partner: Tensor, kept: KeptHeads) -> Tensor:
    # t [B, N, Q] of the kept q/k dims
    heads, dims = kept.qk // len(partner), kept.qk % len(partner)
    place = torch.full((int(kept.whole_columns.numel()),), -1, device=t.device)
    place[kept.qk] = torch.arange(len(kept.qk), device=t.device)
    cosine, sine = turn[:, :, heads if turn.shape[2] > 1 else 0 * heads, dims, : t.shape[1]].to(t.dtype)
    other = t[..., place[heads * len(partner) + partner[dims]]]
    return t * cosine.transpose(1, 2) + other * sine.transpose(1, 2)


def reference(
    x: Tensor,
    weights: AttentionWeights,
    kept: KeptHeads,
    scale: float,
    positions: Positions,
    recompute: bool,
) -> Tensor:
    """The formula in plain torch, any dtype and device, differentiable."""
    A = weights.proj_weight.shape[1]
    rows = torch.cat([kept.qk, kept.qk + A, kept.v + 2 * A])
    weight, proj, proj_bias = _dtypes.cast(
        x.dtype, weights.qkv_weight[rows], weights.proj_weight[:, kept.v], weights.proj_bias
    )
    bias = None if weights.qkv_bias is None else weights.qkv_bias[rows].to(x.dtype)
    q, k, v = F.linear(x, weight, bias).split([len(kept.qk), len(kept.qk), len(kept.v)], -1)
    if positions.turn is not None:
        q, k = (_turned(t, positions.turn, positions.partner, kept) for t in (q, k))
    q_cut, v_cut = kept.qk_offsets.tolist(), kept.v_offsets.tolist()
    heads = [v[..., :0]]
    for h in range(len(v_cut) - 1):
        q_h, k_h = (t[..., q_cut[h] : q_cut[h + 1]] for t in (q, k))
        scores = scale * q_h @ k_h.transpose(-2, -1)
        if positions.bias is not None:
            added = positions.bias[:, h if positions.bias.shape[1] > 1 else 0].to(x.dtype)
            scores = (scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
        heads.append(scores.softmax(-1) @ v[..., v_cut[h] : v_cut[h + 1]])
    return F.linear(torch.cat(heads, -1), proj, proj_bias)


_dispatch.provide_reference(OP, reference)


def _fake(x, *arguments):
    # Without the bias, and behind the four lists of what is kept, turn and partner.
    return fake(x, *arguments[:4], *arguments[5:9], *arguments[11:])


def _fake_backward(grad, x, qkv_weight, qkv_bias, proj_weight, bias, *rest):
    some, needs = fake_backward(grad, x, qkv_weight, qkv_bias, proj_weight, rest[-1]), rest[-1]
    return *some, torch.empty_like(bias) if needs >> 5 & 1 else x.new_empty(0)


if _dispatch.extension_error is None:
    torch.library.register_fake(f"uvc_kernels::{OP}", _fake)
    torch.library.register_fake(f"uvc_kernels::{OP}_backward", _fake_backward)
    # The backward pass needs no proj_bias.
    _call = _autograd.of_extension(OP, 6, unused=4)

    def _cpu(
        x: Tensor,
        weights: AttentionWeights,
        kept: KeptHeads,
        scale: float,
        positions: Positions,
        recompute: bool,
    ) -> Tensor:
        turn, partner, bias = positions
        return _call(x, *weights, bias, *kept[1:5], turn, partner, scale, recompute)

    _dispatch.provide(OP, "cpu", _cpu, "cpu", _dtypes.CPU_DTYPES)


def _fits(tensor: Tensor, shape: tuple[int | tuple[int, int], ...]) -> bool:
    """Whether a tensor has this shape, of which some sizes may be either of two."""
    if tensor.dim() != len(shape):
        return False
    pairs = zip(tensor.shape, shape, strict=True)
    return all(size in wanted if isinstance(wanted, tuple) else size == wanted for size, wanted in pairs)


def attention_with_positions(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kept: KeptHeads,
    scale: float,
    positions: Positions,
    recompute: bool = False,
) -> Tensor:
    """`attention` with positions; dims that are turned together are kept together.

    Everything else as there. Gradients of the bias are sums over the images that share it. ValueError on
    shapes that do not fit.
    """
    check_shapes(x, qkv_weight, proj_weight, kept)
    (B, N, _), (turn, partner, bias), (H, K) = x.shape, positions, kept.whole_columns.shape
    if turn is not None and not _fits(turn, (2, (1, B), (1, H), K, -(-N // UNIT) * UNIT)):
        raise ValueError(
            f"{OP}: turn must be [2, I, G, {K}, {-(-N // UNIT) * UNIT}], got {tuple(turn.shape)}"
        )
    if turn is not None and (partner is None or partner.shape != (K,)):
        got = None if partner is None else tuple(partner.shape)
        raise ValueError(f"{OP}: turn comes with partner [{K}], got {got}")
    h = kept.v_offsets.shape[0] - 1
    if bias is not None and (not _fits(bias, (len(bias), (1, h), N, N)) or B % max(1, len(bias))):
        raise ValueError(f"{OP}: bias must be [a divisor of {B}, heads, {N}, {N}], got {tuple(bias.shape)}")
    weights = AttentionWeights(qkv_weight, qkv_bias, proj_weight, proj_bias)
    _dtypes.check_dtypes(OP, x, *weights)
    x = _dtypes.autocast(x)
    if bias is not None and bias.requires_grad and bias.shape[1] == 1:
        positions = positions._replace(bias=bias.expand(-1, h, -1, -1))
    run = _dispatch.implementation(OP, x.device, x.dtype)
    return run(x, weights, kept, scale, positions, recompute)

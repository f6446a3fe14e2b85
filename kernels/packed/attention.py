"""Attention of a provider: pack, qkv product, core, output product.

    qkv = x Wqkv[rows]^T + bqkv[rows],   heads = core(qkv),   out = heads Wproj[:, columns]^T + bproj

B images, N tokens, D width, M = B*N; S packed q, k and v rows, V packed v dims, h kept heads (`..kept`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autograd, _dtypes
from ..attention import attention_packing
from ..gather import gather
from ..indices import WIDTHS, KeptHeads, counts_of
from ..weights import AttentionWeights, Packed
from .pieces import Pieces, Provider, bias_gradients, declare, multiply

X, QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, PROJ_BIAS = (1 << i for i in range(5))
_TENSORS = "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias"
_KEPT = (
    "Tensor qk, Tensor v, Tensor table, Tensor marks16, Tensor marks32, Tensor marks64, Tensor marks128, "
    "float scale, bool recompute"
)
_SAVED = "Tensor qkv, Tensor heads, Tensor top, Tensor inverse"
# qk and v, the kept dims without padding, are there for their lengths: for those who count FLOPs.
declare("attend", f"({_TENSORS}, {_KEPT}) -> (Tensor out, {_SAVED})")
declare(
    "attend_backward",
    f"(Tensor grad, {_TENSORS}, {_KEPT}, {_SAVED}, int needs) "
    "-> (Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias)",
)


class _Given(NamedTuple):
    """What the ops take behind x and the packed weights: fields of `KeptHeads`, then numbers."""

    qk: Tensor
    v: Tensor
    table: Tensor
    marks16: Tensor
    marks32: Tensor
    marks64: Tensor
    marks128: Tensor
    scale: float
    recompute: bool

    def counts(self) -> list[int]:
        """Heads of each width."""
        return counts_of((self.marks16, self.marks32, self.marks64, self.marks128))


def _named(arguments: Sequence) -> tuple[AttentionWeights, _Given, Sequence]:
    # The arguments of an op behind x, by name.
    return AttentionWeights(*arguments[:4]), _Given(*arguments[4:13]), arguments[13:]


def _core_outputs(x: Tensor, w: AttentionWeights, given: _Given) -> tuple[Tensor, Tensor, Tensor]:
    M, h = x.shape[0] * x.shape[1], given.table.shape[0]
    top, inverse = (x.new_empty(h, M, dtype=_dtypes.statistics_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(M, w.proj_weight.shape[1]), top, inverse


def _attend(pieces: Pieces, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, _ = _named(arguments)
    counts = given.counts()
    if sum(counts) != given.table.shape[0]:
        raise ValueError(
            f"attention: a head of more than {WIDTHS[-1]} dims needs the backend cpu or reference"
        )
    B, N, D = x.shape
    heads, top, inverse = _core_outputs(x, w, given)
    qkv = multiply(x.reshape(B * N, D), w.qkv_weight.t(), w.qkv_bias)
    if heads.numel():
        pieces.attention_core(qkv, given.table, counts, N, given.scale, heads, top, inverse)
    out = multiply(heads, w.proj_weight.t(), w.proj_bias).view(B, N, w.proj_weight.shape[0])
    return out, None if given.recompute else qkv, heads, top, inverse


def _attend_backward(pieces: Pieces, grad: Tensor, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, (qkv, heads, top, inverse, needs) = _named(arguments)
    B, N, D = x.shape
    grad, rows = grad.reshape(B * N, w.proj_weight.shape[0]), x.reshape(B * N, D)
    grad_x = grad_qkv_weight = of_qkv = None
    if needs & (X | QKV_WEIGHT | QKV_BIAS):
        qkv = multiply(rows, w.qkv_weight.t(), w.qkv_bias) if given.recompute else qkv
        grad_qkv = torch.empty_like(qkv)
        if heads.numel():
            grad_heads, counts = grad @ w.proj_weight, given.counts()
            pieces.attention_core_backward(
                qkv, heads, grad_heads, top, inverse, given.table, counts, N, given.scale, grad_qkv
            )
        grad_x = (grad_qkv @ w.qkv_weight).view(x.shape) if needs & X else None
        grad_qkv_weight = grad_qkv.t() @ rows if needs & QKV_WEIGHT else None
        of_qkv = (grad_qkv, w.qkv_bias) if needs & QKV_BIAS else None
    grad_proj_weight = grad.t() @ heads if needs & PROJ_WEIGHT else None
    of_proj = (grad, w.proj_bias) if needs & PROJ_BIAS else None
    grad_qkv_bias, grad_proj_bias = bias_gradients(pieces, of_qkv, of_proj)
    return grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias


def _fake(x, *arguments):
    w, given, _ = _named(arguments)
    out = x.new_empty(*x.shape[:2], w.proj_weight.shape[0])
    qkv = x.new_empty((0,) if given.recompute else (x.shape[0] * x.shape[1], w.qkv_weight.shape[0]))
    return out, qkv, *_core_outputs(x, w, given)


def _fake_backward(grad, x, *arguments):
    return _autograd.empty_gradients((x, *arguments[:4]), arguments[-1])


def define(provider: Provider) -> dict[str, Callable]:
    """The ops of this provider."""
    forward, backward = (_attend, _fake), (_attend_backward, _fake_backward)
    attend = provider.differentiable("attend", "attention", 5, forward, backward)

    def run(
        x: Tensor, weights: AttentionWeights, kept: KeptHeads, scale: float, packed: Packed, recompute: bool
    ) -> Tensor:
        if packed is None:
            packed = gather(*attention_packing(*weights, kept), x.dtype)
        given = _Given(kept.qk, kept.v, kept.table, *kept[-4:], scale, recompute)
        *packed, proj_bias = packed
        return attend(x, *packed, weights.proj_bias if proj_bias is None else proj_bias, *given)

    return {"attention": run}

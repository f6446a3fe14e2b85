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

X, QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, PROJ_BIAS, BIAS = (1 << i for i in range(6))
TENSORS = "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias"
KEPT = "Tensor qk, Tensor v, Tensor table, Tensor marks16, Tensor marks32, Tensor marks64, Tensor marks128"
NUMBERS = "float scale, bool recompute"
SAVED = "Tensor qkv, Tensor heads, Tensor top, Tensor inverse"
# qk and v, the kept dims without padding, are there for their lengths: for those who count FLOPs.
GRADIENTS = "Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias"
declare("attend", f"({TENSORS}, {KEPT}, {NUMBERS}) -> (Tensor out, {SAVED})")
declare(
    "attend_backward",
    f"(Tensor grad, {TENSORS}, {KEPT}, {NUMBERS}, {SAVED}, int needs) -> ({GRADIENTS})",
)


class Given(NamedTuple):
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


class Nowhere:
    """Tokens without positions."""

    def turn_(self, pieces: Pieces, qkv: Tensor, given: Given, tokens: int, back: bool = False) -> None:
        """Turns q and k of `qkv` in place, or back where they are gradients."""

    def added(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the core takes besides: a bias of the scores, and whose."""
        return ()

    def bias_gradient(self, pieces: Pieces, *core) -> Tensor:
        """The gradient of that bias, of what the core's backward pass reads; never asked for without one."""
        raise RuntimeError("there is no bias that could have a gradient")


NOWHERE = Nowhere()


def _named(arguments: Sequence) -> tuple[AttentionWeights, Given, Sequence]:
    # The arguments of an op behind x, by name.
    return AttentionWeights(*arguments[:4]), Given(*arguments[4:13]), arguments[13:]


def core_outputs(x: Tensor, w: AttentionWeights, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    M, h = x.shape[0] * x.shape[1], given.table.shape[0]
    top, inverse = (x.new_empty(h, M, dtype=_dtypes.statistics_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(M, w.proj_weight.shape[1]), top, inverse


def attend(
    pieces: Pieces, x: Tensor, w: AttentionWeights, given: Given, placed: Nowhere = NOWHERE
) -> tuple[Tensor | None, ...]:
    """The output, and what is saved for the backward pass."""
    counts = given.counts()
    if sum(counts) != given.table.shape[0]:
        raise ValueError(
            f"attention: a head of more than {WIDTHS[-1]} dims needs the backend cpu or reference"
        )
    B, N, D = x.shape
    heads, top, inverse = core_outputs(x, w, given)
    qkv = multiply(x.reshape(B * N, D), w.qkv_weight.t(), w.qkv_bias)
    if heads.numel():
        placed.turn_(pieces, qkv, given, N)
        added = placed.added(x.dtype)
        pieces.attention_core(qkv, given.table, counts, N, given.scale, heads, top, inverse, *added)
    out = multiply(heads, w.proj_weight.t(), w.proj_bias).view(B, N, w.proj_weight.shape[0])
    return out, None if given.recompute else qkv, heads, top, inverse


def attend_backward(
    pieces: Pieces,
    grad: Tensor,
    x: Tensor,
    w: AttentionWeights,
    given: Given,
    saved: Sequence[Tensor],
    needs: int,
    placed: Nowhere = NOWHERE,
) -> tuple[Tensor | None, ...]:
    """The gradients that `needs` names, of x, the weights and a bias of the scores."""
    (B, N, D), (qkv, heads, top, inverse) = x.shape, saved
    grad, rows = grad.reshape(B * N, w.proj_weight.shape[0]), x.reshape(B * N, D)
    grad_x = grad_qkv_weight = of_qkv = grad_bias = None
    of_x = needs & (X | QKV_WEIGHT | QKV_BIAS)
    if of_x or needs & BIAS:
        grad_heads = grad @ w.proj_weight
        if given.recompute:
            qkv = multiply(rows, w.qkv_weight.t(), w.qkv_bias)
            placed.turn_(pieces, qkv, given, N)
        core = qkv, heads, grad_heads, top, inverse, given.table, given.counts(), N, given.scale
        added = placed.added(x.dtype)
        grad_bias = placed.bias_gradient(pieces, *core, *added) if needs & BIAS else None
    if of_x:
        grad_qkv = torch.empty_like(qkv)
        if heads.numel():
            pieces.attention_core_backward(*core, grad_qkv, *added)
            placed.turn_(pieces, grad_qkv, given, N, back=True)
        grad_x = (grad_qkv @ w.qkv_weight).view(x.shape) if needs & X else None
        grad_qkv_weight = grad_qkv.t() @ rows if needs & QKV_WEIGHT else None
        of_qkv = (grad_qkv, w.qkv_bias) if needs & QKV_BIAS else None
    grad_proj_weight = grad.t() @ heads if needs & PROJ_WEIGHT else None
    of_proj = (grad, w.proj_bias) if needs & PROJ_BIAS else None
    grad_qkv_bias, grad_proj_bias = bias_gradients(pieces, of_qkv, of_proj)
    return grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias, grad_bias


def fake(x: Tensor, w: AttentionWeights, given: Given) -> tuple[Tensor, ...]:
    """What stands for the results of `attend` where torch traces."""
    out = x.new_empty(*x.shape[:2], w.proj_weight.shape[0])
    qkv = x.new_empty((0,) if given.recompute else (x.shape[0] * x.shape[1], w.qkv_weight.shape[0]))
    return out, qkv, *core_outputs(x, w, given)


def _attend(pieces: Pieces, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, _ = _named(arguments)
    return attend(pieces, x, w, given)


def _attend_backward(pieces: Pieces, grad: Tensor, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, (*saved, needs) = _named(arguments)
    return attend_backward(pieces, grad, x, w, given, saved, needs)[:5]


def _fake(x, *arguments):
    return fake(x, *_named(arguments)[:2])


def _fake_backward(grad, x, *arguments):
    return _autograd.empty_gradients((x, *arguments[:4]), arguments[-1])


def inputs(x: Tensor, weights: AttentionWeights, kept: KeptHeads, packed: Packed) -> tuple:
    """The first inputs of an op: x and what is packed of the weights."""
    if packed is None:
        packed = gather(*attention_packing(*weights, kept), x.dtype)
    *packed, proj_bias = packed
    return x, *packed, weights.proj_bias if proj_bias is None else proj_bias


def define(provider: Provider) -> dict[str, Callable]:
    """The ops of this provider."""
    forward, backward = (_attend, _fake), (_attend_backward, _fake_backward)
    run_op = provider.differentiable("attend", "attention", 5, forward, backward)

    def run(
        x: Tensor, weights: AttentionWeights, kept: KeptHeads, scale: float, packed: Packed, recompute: bool
    ) -> Tensor:
        given = Given(kept.qk, kept.v, kept.table, *kept[-4:], scale, recompute)
        return run_op(*inputs(x, weights, kept, packed), *given)

    return {"attention": run}

"""Attention with positions of a provider: as in `attention.py`, with q and k turned and a bias of the scores.

    qkv = x Wqkv[rows]^T + bqkv[rows],   q, k turned in place,   heads = core(qkv, bias)

In the backward pass the gradients of q and k are turned back in place before they are multiplied. B images, N
tokens, h kept heads, P biases.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autograd
from ..attention_with_positions import OP, Positions
from ..indices import KeptHeads, align
from ..weights import AttentionWeights
from . import attention
from .attention import GRADIENTS, KEPT, NUMBERS, SAVED, TENSORS, Given
from .pieces import Pieces, Provider, declare

NAME = "attend_with_positions"
_GIVEN = (
    f"{TENSORS}, Tensor? bias, {KEPT}, Tensor order, Tensor rows, Tensor whole_rows, Tensor? turn, "
    f"Tensor? partner, {NUMBERS}"
)
declare(NAME, f"({_GIVEN}) -> (Tensor out, {SAVED})")
declare(f"{NAME}_backward", f"(Tensor grad, {_GIVEN}, {SAVED}, int needs) -> ({GRADIENTS}, Tensor bias)")


class _Placed(NamedTuple):
    """What positions do, as `attention.Nowhere` does nothing; order, rows, whole_rows: of `KeptHeads`."""

    bias: Tensor | None
    order: Tensor
    rows: Tensor
    whole_rows: Tensor
    turn: Tensor | None
    partner: Tensor | None

    def turn_(self, pieces: Pieces, qkv: Tensor, given: Given, tokens: int, back: bool = False) -> None:
        if self.turn is not None:
            where = self.rows, self.whole_rows, self.partner
            pieces.turn(qkv, given.table, given.counts(), tokens, *where, self.turn, back)

    def added(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if self.bias is None:
            return ()
        # One for all heads is read as one; rows of a multiple of 8 numbers are read 16 bytes at a time.
        bias, N = self.bias[:, :1] if self.bias.stride(1) == 0 else self.bias, self.bias.shape[-1]
        padded = bias.new_empty(*bias.shape[:3], align(N), dtype=dtype)
        padded[..., :N] = bias
        padded[..., N:] = 0
        return padded, self.order

    def bias_gradient(self, pieces: Pieces, qkv: Tensor, heads: Tensor, *core) -> Tensor:
        grad = torch.empty_like(self.bias, memory_format=torch.contiguous_format)
        if not heads.numel():
            return grad.zero_()
        pieces.bias_gradient(qkv, heads, *core, grad)
        return grad


def _named(arguments: Sequence) -> tuple[AttentionWeights, Given, _Placed, Sequence]:
    # The arguments of an op behind x, by name.
    weights, given = AttentionWeights(*arguments[:4]), Given(*arguments[5:12], *arguments[17:19])
    return weights, given, _Placed(arguments[4], *arguments[12:17]), arguments[19:]


def _attend(pieces: Pieces, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, placed, _ = _named(arguments)
    return attention.attend(pieces, x, w, given, placed)


def _attend_backward(pieces: Pieces, grad: Tensor, x: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    w, given, placed, (*saved, needs) = _named(arguments)
    return attention.attend_backward(pieces, grad, x, w, given, saved, needs, placed)


def _fake(x, *arguments):
    return attention.fake(x, *_named(arguments)[:2])


def _fake_backward(grad, x, *arguments):
    return _autograd.empty_gradients((x, *arguments[:5]), arguments[-1])


def define(provider: Provider) -> dict[str, Callable]:
    """The op of this provider."""
    forward, backward = (_attend, _fake), (_attend_backward, _fake_backward)
    run_op = provider.differentiable(NAME, OP, 6, forward, backward)

    def run(
        x: Tensor,
        weights: AttentionWeights,
        kept: KeptHeads,
        scale: float,
        positions: Positions,
        recompute: bool,
    ) -> Tensor:
        turn, partner, bias = positions
        if turn is not None:
            # GPU kernels read no float64.
            turn = (turn.float() if turn.dtype.itemsize > x.dtype.itemsize else turn).contiguous()
        lists = kept.qk, kept.v, kept.table, *kept[-4:], kept.order, kept.rows, kept.whole_rows
        given = bias, *lists, turn, partner, scale, recompute
        return run_op(*attention.inputs(x, weights, kept, None), *given)

    return {OP: run}

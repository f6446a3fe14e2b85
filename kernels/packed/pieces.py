"""What a provider supplies, and how it becomes a backend."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autograd


class Pieces(NamedTuple):
    """The kernels of a provider. Every tensor is contiguous, every output is allocated by the caller.

    gather(sources, indices, dims, outs): rows (dim 0) or columns (dim 1) of matrices, entries of vectors, by
    int32 indices where -1 gives zeros, cast to the dtype of outs; one launch.
    attention_core(qkv [M, S], table [h, 6], counts, tokens, scale, heads [M, V], top [h, M], inverse [h, M]):
    softmax attention of every head of every image. The first counts[0] heads of the table are at most 16 dims
    wide, the next counts[1] at most 32, then 64, then 128. top, inverse: largest score and 1 / sum of each
    query, for the backward pass, in statistics dtype.
    attention_core_backward(qkv, heads, grad_heads, top, inverse, table, counts, tokens, scale, grad_qkv).
    Both take two more for a bias that is added to the scores: bias [P, heads or 1, N, N up to a multiple of
    8], in the dtype of qkv, zeros behind N, and order, of `KeptHeads`.
    activate(u, gate or None, activation, a): a = act(u), or act(gate) u; all [M, F'].
    activate_backward(u, gate or None, grad_a, activation, a, grad_u, grad_gate or None): a again, and the
    gradients.
    column_sums(matrices, outs): the sum over the rows of each of up to three matrices of one height, in their
    dtype; one launch.
    group_scores(a, b, dims) -> scores; prox_shrink(weights, factors, dims): the ops of these names.
    turn(qkv, table, counts, tokens, rows, whole_rows, partner, tables, back): q and k of qkv turned in place
    by `Positions.turn`, or their gradients turned back.
    bias_gradient(qkv, heads, grad_heads, top, inverse, table, counts, tokens, scale, bias, order, grad_bias):
    the gradient [P, h, N, N] of such a bias, in its own dtype.
    """

    gather: Callable[[list[Tensor], list[Tensor], list[int], list[Tensor]], None]
    attention_core: Callable[..., None]
    attention_core_backward: Callable[..., None]
    activate: Callable[..., None]
    activate_backward: Callable[..., None]
    column_sums: Callable[[list[Tensor], list[Tensor]], None]
    group_scores: Callable[[list[Tensor], list[Tensor], list[int]], Tensor]
    prox_shrink: Callable[[list[Tensor], Tensor, list[int]], None]
    turn: Callable[..., None]
    bias_gradient: Callable[..., None]


SUFFIXES = ("triton", "cuda", "cuda_host")


def declare(name: str, schema: str) -> None:
    """Declares the op `name` of every provider, loaded or not.

    A flop counter looks ops up by their declaration (`flops.py`), perhaps before a provider's first use.
    """
    for suffix in SUFFIXES:
        torch.library.define(f"uvc_kernels::{name}_{suffix}", schema)


class Provider(NamedTuple):
    """Under which names a provider's ops are registered, and its pieces."""

    suffix: str
    device: str
    pieces: Pieces

    def define(self, name: str, run: Callable, fake: Callable) -> str:
        """Makes `run(pieces, ...)` the declared op `uvc_kernels::name_suffix`; returns that name."""
        name = f"uvc_kernels::{name}_{self.suffix}"
        torch.library.impl(name, self.device)(partial(run, self.pieces))
        torch.library.register_fake(name, fake)
        return name

    def differentiable(
        self,
        name: str,
        op: str,
        leaves: int,
        forward: tuple[Callable, Callable],
        backward: tuple[Callable, Callable],
    ) -> Callable:
        """Defines the op `name` and its gradient `name_backward`, and returns what calls it for its output.

        op: its public name; leaves: how many of the first inputs have gradients; forward, backward: what runs
        and what stands for it where torch traces.
        """
        full_name = self.define(name, whole(forward[0]), forward[1])
        self.define(f"{name}_backward", whole(backward[0]), backward[1])
        gradient = _autograd.Gradient(op, self.op(f"{name}_backward"), leaves)
        _autograd.differentiate(full_name, gradient)
        run, run_backward = (partial(way[0], self.pieces) for way in (forward, backward))
        return _autograd.shortcut(gradient._replace(backward=run_backward), run, self.op(name))

    def op(self, name: str) -> Callable:
        """The op that `define` registered."""
        return getattr(torch.ops.uvc_kernels, f"{name}_{self.suffix}").default


def multiply(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b + bias, by the vendor's GEMM."""
    return a @ b if bias is None else torch.addmm(bias if bias.dtype == a.dtype else bias.to(a.dtype), a, b)


def bias_gradients(pieces: Pieces, *asked: tuple[Tensor, Tensor] | None) -> list[Tensor | None]:
    """The sum over the rows of each gradient in the dtype of its bias; None stays None.

    asked: pairs of a gradient, of one height and dtype, and the bias it is of. In one launch, where torch
    takes two for each: its sum of a tall matrix has counters to clear.
    """
    sums, matrices, outs = [], [], []
    for pair in asked:
        if pair is None:
            sums.append(None)
        elif pair[1].dtype != pair[0].dtype or not pair[1].numel():
            # Only a bias that was not packed along with its weight.
            sums.append(pair[0].sum(0, dtype=pair[1].dtype))
        else:
            out = torch.empty_like(pair[1])
            sums.append(out)
            matrices.append(pair[0].contiguous())
            outs.append(out)
    if outs:
        pieces.column_sums(matrices, outs)
    return sums


def whole(run: Callable) -> Callable:
    """An op returns tensors only: an empty one stands for each None that `run` gives."""

    def op(pieces: Pieces, first: Tensor, *others) -> tuple[Tensor, ...]:
        return tuple(first.new_empty(0) if t is None else t for t in run(pieces, first, *others))

    return op

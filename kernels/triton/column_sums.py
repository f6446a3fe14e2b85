"""The sum over the rows of each column of up to three matrices on Triton: gradients of biases, in one launch.

A program owns some columns of one matrix and adds up all of its rows: every run adds in the same order.
"""

import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, ELEMENT, Case, eights, narrow, wide


class Block(NamedTuple):
    """Rows per step, columns per program."""

    rows: int
    columns: int


# 32 bytes of a row of 16-bit numbers, as memory is read; few columns, as a layer's are a few hundred.
BLOCK = Block(512, 16)
MOST = 3
PARTS = tl.constexpr(32)  # that rows of a step are added up in


@triton.jit
def _sum(matrix, out, height, width, tile, ACC: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        width = eights(width)
    column = tile * BLOCK.columns + tl.arange(0, BLOCK.columns)
    total = tl.full((BLOCK.rows, BLOCK.columns), 0.0, ACC)
    for start in range(0, height, BLOCK.rows):
        row = (start + tl.arange(0, BLOCK.rows)).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]  # [BLOCK]
        total += tl.load(matrix + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(ACC)
    # In two steps, as one long chain of additions rounds more often.
    some = tl.sum(tl.reshape(total, (BLOCK.rows // PARTS, PARTS, BLOCK.columns)), 0)
    tl.store(out + column, narrow(tl.sum(some, 0), out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=("height", "width", "width_1", "width_2"))
def _sums(matrix, matrix_1, matrix_2, out, out_1, out_2, height, width, width_1, width_2, ACC: tl.constexpr,
          BLOCK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    first = (width + BLOCK.columns - 1) // BLOCK.columns
    second = first + (width_1 + BLOCK.columns - 1) // BLOCK.columns
    if tile < first:
        _sum(matrix, out, height, width, tile, ACC, BLOCK, EVEN[0])
    elif tile < second:
        _sum(matrix_1, out_1, height, width_1, tile - first, ACC, BLOCK, EVEN[1])
    else:
        _sum(matrix_2, out_2, height, width_2, tile - second, ACC, BLOCK, EVEN[2])


def column_sums(matrices: list[Tensor], outs: list[Tensor]) -> None:
    """Fills `outs`, one number for each column; contiguous matrices of one height and dtype."""
    widths = [matrix.shape[1] for matrix in matrices]
    programs = sum(triton.cdiv(width, BLOCK.columns) for width in widths)
    if programs:
        # One that is missing is the first, without a column.
        lacking = MOST - len(matrices)
        _sums[(programs,)](
            *matrices, *[matrices[0]] * lacking, *outs, *[outs[0]] * lacking,
            matrices[0].shape[0], *widths, *[0] * lacking,
            ACC=wide(outs[0].dtype), BLOCK=BLOCK, EVEN=_even(widths), num_warps=8,
        )  # fmt: skip


def _even(widths: list[int]) -> tuple[bool, ...]:
    # Of each matrix by itself: how it is read decides the order of adding up, which others must not change.
    return tuple(width % 8 == 0 for width in widths + [0] * (MOST - len(widths)))


def cases() -> list[Case]:
    """Everything `column_sums` can launch."""
    found = []
    for dtype in DTYPES:
        for even in itertools.product((True, False), repeat=MOST):
            signature = {name: f"*{ELEMENT[dtype]}" for name in _sums.arg_names[: 2 * MOST]}
            signature |= dict.fromkeys(_sums.arg_names[2 * MOST : -3], "i32")
            constants = {"ACC": wide(dtype), "BLOCK": BLOCK, "EVEN": even}
            label = " ".join([str(ELEMENT[dtype]), *("even" if one else "odd" for one in even)])
            options = {hip: {"num_warps": 8} for hip in (False, True)}
            found.append(Case(_sums, label, signature, constants, options))
    return found

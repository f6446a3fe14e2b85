"""Kept rows of one matrix, kept columns of another and kept entries of a bias, gathered in one launch.

    rows_out[i, :] = rows[row_index[i], :]      bias_out[i] = bias[row_index[i]]
    columns_out[:, j] = columns[:, column_index[j]]                                index -1 gives zeros

Packing gathers kept weights; with the inverse indices the same kernel spreads packed gradients over full-size
ones and writes the zeros of removed groups itself.
"""

import itertools

import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, ELEMENT, Case, eights

BLOCK_R, BLOCK_C = 8, 128
# Specialised on none of them, the kernel serves every structure without being compiled again.
SIZES = ("n_rows", "width", "height", "n_columns", "columns_stride", "row_tiles", "bias_tiles")


@triton.jit
def _rows(source, out, index, n_rows, width, tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    across = (width + BLOCK_C - 1) // BLOCK_C
    i = tile // across * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tile % across * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.load(index + i, mask=i < n_rows, other=-1).to(tl.int64)
    inside = (i < n_rows)[:, None] & (j < width)[None, :]  # [BLOCK_R, BLOCK_C]
    kept = inside & (place >= 0)[:, None]
    value = tl.load(source + place[:, None] * width + j[None, :], mask=kept, other=0.0)
    tl.store(out + i.to(tl.int64)[:, None] * width + j[None, :], value, mask=inside)


@triton.jit
def _columns(
    source, out, index, height, n_columns, stride, tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    across = (n_columns + BLOCK_C - 1) // BLOCK_C
    i = tile // across * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tile % across * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.load(index + j, mask=j < n_columns, other=-1)
    inside = (i < height)[:, None] & (j < n_columns)[None, :]  # [BLOCK_R, BLOCK_C]
    kept = inside & (place >= 0)[None, :]
    row = i.to(tl.int64)[:, None]
    value = tl.load(source + row * stride + place[None, :], mask=kept, other=0.0)
    tl.store(out + row * n_columns + j[None, :], value, mask=inside)


@triton.jit
def _entries(source, out, index, size, tile, BLOCK: tl.constexpr):
    i = tile * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + i, mask=i < size, other=-1)
    tl.store(out + i, tl.load(source + place, mask=place >= 0, other=0.0), mask=i < size)


@triton.jit(do_not_specialize=SIZES)
def _gather(
    rows, rows_out, bias, bias_out, columns, columns_out, row_index, column_index,
    n_rows, width, height, n_columns, columns_stride, row_tiles, bias_tiles,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if EVEN:
        width, n_columns = eights(width), eights(n_columns)
    if tile < row_tiles:
        _rows(rows, rows_out, row_index, n_rows, width, tile, BLOCK_R, BLOCK_C)
    elif tile < row_tiles + bias_tiles:
        _entries(bias, bias_out, row_index, n_rows, tile - row_tiles, BLOCK_C)
    else:
        tile = tile - row_tiles - bias_tiles
        _columns(
            columns, columns_out, column_index, height, n_columns, columns_stride, tile, BLOCK_R, BLOCK_C
        )


def gather(
    rows: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    row_index: Tensor,
    column_index: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The kept rows [R, W] of `rows`, entries [R] of `bias` and columns [H, C] of `columns`; None stays None.

    `row_index` [R], `column_index` [C]: int32 positions, -1 for zeros. The inputs are contiguous and of one
    dtype.
    """
    R, C = row_index.shape[0], column_index.shape[0]
    out = (
        None if rows is None else rows.new_empty(R, rows.shape[1]),
        None if bias is None else bias.new_empty(R),
        None if columns is None else columns.new_empty(columns.shape[0], C),
    )
    width = 0 if rows is None else rows.shape[1]
    height, stride = (0, 0) if columns is None else columns.shape
    row_tiles = triton.cdiv(R, BLOCK_R) * triton.cdiv(width, BLOCK_C)
    bias_tiles = 0 if bias is None else triton.cdiv(R, BLOCK_C)
    tiles = row_tiles + bias_tiles + triton.cdiv(height, BLOCK_R) * triton.cdiv(C, BLOCK_C)
    if tiles:
        # A missing tensor has no tiles, so what stands in for its pointer is never read.
        pairs = [t for pair in zip((rows, bias, columns), out, strict=True) for t in pair]
        anything = next(t for t in pairs if t is not None)
        _gather[(tiles,)](
            *(anything if t is None else t for t in pairs), row_index, column_index,
            R, width, height, C, stride, row_tiles, bias_tiles,
            BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, EVEN=width % 8 == C % 8 == 0,
        )  # fmt: skip
    return out


def cases() -> list[Case]:
    """Everything `gather` can launch."""
    found = []
    for dtype, even in itertools.product(DTYPES, (True, False)):
        names = ("rows", "rows_out", "bias", "bias_out", "columns", "columns_out")
        signature = dict.fromkeys(names, f"*{ELEMENT[dtype]}") | dict.fromkeys(SIZES, "i32")
        signature |= {"row_index": "*i32", "column_index": "*i32"}
        label = f"{ELEMENT[dtype]} {'even' if even else 'odd'}"
        found.append(Case(_gather, label, signature, {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "EVEN": even}))
    return found

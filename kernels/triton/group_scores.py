"""Scores of rows or columns of many matrices on Triton: one launch for all layers.

    dim 0: score[i] = sum_j a[i, j] b[i, j]      dim 1: score[j] = sum_i a[i, j] b[i, j]

A program owns some groups of one matrix and adds up all of their terms: every run adds in the same order.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _dtypes
from .launch import DTYPES, ELEMENT, Case, addresses, tiles_of, wide


class Block(NamedTuple):
    """Groups per program, terms per step."""

    groups: int
    terms: int


ROWS, COLUMNS = Block(8, 256), Block(64, 32)  # where groups are rows, columns
FIELDS = tl.constexpr(6)


@triton.jit
def _sums(a, b, out, groups, terms, tile, BY_ROW: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    # Sums along rows (axis 1) or columns (axis 0) of one matrix, of all terms of some groups.
    AXIS: tl.constexpr = 1 if BY_ROW else 0
    group = tile.to(tl.int64) * BLOCK.groups + tl.arange(0, BLOCK.groups)
    groups_at = tl.expand_dims(group, AXIS)
    total = tl.full((BLOCK.groups, BLOCK.terms) if BY_ROW else (BLOCK.terms, BLOCK.groups), 0.0, ACC)
    for start in range(0, terms, BLOCK.terms):
        term = tl.expand_dims(start + tl.arange(0, BLOCK.terms), 1 - AXIS)
        inside = (groups_at < groups) & (term < terms)
        at = groups_at * terms + term if BY_ROW else term * groups + groups_at
        first = tl.load(a + at, mask=inside, other=0.0).to(ACC)
        total += first * tl.load(b + at, mask=inside, other=0.0).to(ACC)
    tl.store(out + group, tl.sum(total, AXIS), mask=group < groups)


@triton.jit
def _scores(table, tiles, out, ELEMENT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr):  # fmt: skip
    matrix, tile = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    row = table + matrix * FIELDS
    a, b = tl.load(row).to(tl.pointer_type(ELEMENT)), tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    groups, terms, by_row, place = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    if by_row != 0:
        _sums(a, b, out + place, groups, terms, tile, True, ACC, ROWS)
    else:
        _sums(a, b, out + place, groups, terms, tile, False, ACC, COLUMNS)


def group_scores(a: list[Tensor], b: list[Tensor], dims: list[int]) -> Tensor:
    """The scores of all groups, one after the other; contiguous tensors of one dtype."""
    # A vector is a matrix of one row whose columns are the groups.
    shapes = [
        (t.shape[d], t.numel() // max(1, t.shape[d]), int(t.dim() == 2 and d == 0))
        for t, d in zip(a, dims, strict=True)
    ]
    out = a[0].new_empty(sum(groups for groups, _, _ in shapes), dtype=_dtypes.statistics_dtype(a[0].dtype))
    fields, place = [], 0
    for first, second, (groups, terms, by_row) in zip(a, b, shapes, strict=True):
        fields.append((first.data_ptr(), second.data_ptr(), groups, terms, by_row, place))
        place += groups
    counts = tuple(triton.cdiv(groups, (ROWS if by_row else COLUMNS).groups) for groups, _, by_row in shapes)
    if sum(counts):
        _scores[(sum(counts),)](
            addresses(tuple(fields), out.device), tiles_of(counts, out.device), out,
            ELEMENT=ELEMENT[a[0].dtype], ACC=wide(a[0].dtype), ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def cases() -> list[Case]:
    """Everything `group_scores` can launch."""
    found = []
    for dtype in DTYPES:
        signature = {"table": "*i64", "tiles": "*i32", "out": f"*{wide(dtype)}"}
        constants = {"ELEMENT": ELEMENT[dtype], "ACC": wide(dtype), "ROWS": ROWS, "COLUMNS": COLUMNS}
        found.append(Case(_scores, str(ELEMENT[dtype]), signature, constants))
    return found

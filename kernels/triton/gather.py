"""Kept rows, columns and entries of many matrices, packed or spread, and cast, in one launch.

    dim 0: out[i, :] = source[index[i], :]      dim 1: out[:, j] = source[:, index[j]]    index -1 gives zeros

Packing gathers kept weights; with the inverse indices the same kernel spreads packed gradients over
full-size ones and writes the zeros of removed groups itself.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, ELEMENT, Case, Tile, addresses, eights, narrow

TILE = Tile(16, 128)
SEARCH = tl.constexpr(128)  # matrices looked at in one step
# Numbers per matrix: source, index, out, height and width of out, width of source, by_row, first program.
FIELDS = tl.constexpr(8)
STRIDE, BY_ROW, FIRST = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


@triton.jit
def _matrix_of(table, matrices):
    # The matrix whose programs include this one: the last that starts at or before it.
    found = -1
    for first in range(0, matrices, SEARCH):
        i = first + tl.arange(0, SEARCH)
        start = tl.load(table + i * FIELDS + FIRST, mask=i < matrices, other=2**62)
        found += tl.sum((start <= tl.program_id(0)).to(tl.int32), 0)
    return found


@triton.jit
def _rows(source, index, out, i, j, height, width):
    inside = (i < height)[:, None] & (j < width)[None, :]  # [TILE]
    place = tl.load(index + i, mask=i < height, other=-1).to(tl.int64)
    kept = inside & (place >= 0)[:, None]
    value = tl.load(source + place[:, None] * width + j[None, :], mask=kept, other=0.0)
    tl.store(out + i[:, None] * width + j[None, :], narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _columns(source, index, out, i, j, height, width, stride):
    inside = (i < height)[:, None] & (j < width)[None, :]  # [TILE]
    place = tl.load(index + j, mask=j < width, other=-1)
    kept = inside & (place >= 0)[None, :]
    value = tl.load(source + i[:, None] * stride + place[None, :], mask=kept, other=0.0)
    tl.store(out + i[:, None] * width + j[None, :], narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("matrices",))
def _gather(table, matrices, SOURCE: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):
    row = table + _matrix_of(table, matrices) * FIELDS
    source = tl.load(row).to(tl.pointer_type(SOURCE))
    index = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    out = tl.load(row + 2).to(tl.pointer_type(OUT))
    height, width = tl.load(row + 3), tl.load(row + 4)
    if EVEN:
        source, out, width = tl.multiple_of(source, 16), tl.multiple_of(out, 16), eights(width)
    tile = tl.program_id(0) - tl.load(row + FIRST)
    across = (width + TILE.columns - 1) // TILE.columns
    i, j = (
        tile // across * TILE.rows + tl.arange(0, TILE.rows),
        tile % across * TILE.columns + tl.arange(0, TILE.columns),
    )
    if tl.load(row + BY_ROW) != 0:
        _rows(source, index, out, i, j, height, width)
    else:
        _columns(source, index, out, i, j, height, width, tl.load(row + STRIDE))


def gather(sources: list[Tensor], indices: list[Tensor], dims: list[int], outs: list[Tensor]) -> None:
    """Fills `outs`; one launch for all sources of one dtype and outs of one dtype, as a model's weights are.

    Contiguous matrices and vectors (dim 0), int32 indices as long as dim `dim` of `out`. The table of
    addresses is copied to the device again only when one of them changed.
    """
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    programs: dict[tuple, int] = {}
    for source, index, dim, out in zip(sources, indices, dims, outs, strict=True):
        # A vector is a matrix of one row whose columns are gathered.
        height, width = out.shape if out.dim() == 2 else (1, out.shape[0])
        by_row = int(out.dim() == 2 and dim == 0)
        kind = source.dtype, out.dtype
        first = programs.get(kind, 0)
        tiles = triton.cdiv(height, TILE.rows) * triton.cdiv(width, TILE.columns)
        if tiles:
            fields = (height, width, source.shape[-1], by_row, first)
            addressed = (source.data_ptr(), index.data_ptr(), out.data_ptr(), *fields)
            groups.setdefault(kind, []).append(addressed)
            programs[kind] = first + tiles
    for kind, fields in groups.items():
        even = all(source % 16 == out % 16 == width % 8 == 0 for source, _, out, _, width, *_ in fields)
        _gather[(programs[kind],)](
            addresses(tuple(fields), outs[0].device), len(fields),
            SOURCE=ELEMENT[kind[0]], OUT=ELEMENT[kind[1]], TILE=TILE, EVEN=even,
        )  # fmt: skip


def cases() -> list[Case]:
    """Everything `gather` can launch for weights and activations of one dtype, or float32 weights."""
    found = []
    float32 = DTYPES[2]
    pairs = {(a, b) for dtype in DTYPES for a, b in ((dtype, dtype), (dtype, float32), (float32, dtype))}
    for source, out in sorted(pairs, key=str):
        for even in (True, False):
            signature = {"table": "*i64", "matrices": "i32"}
            label = f"{ELEMENT[source]} to {ELEMENT[out]} {'even' if even else 'odd'}"
            constants = {"SOURCE": ELEMENT[source], "OUT": ELEMENT[out], "TILE": TILE, "EVEN": even}
            found.append(Case(_gather, label, signature, constants))
    return found

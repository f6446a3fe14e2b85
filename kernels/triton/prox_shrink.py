"""Scale rows or columns of many matrices in place on Triton: one launch for all layers.

dim 0: w[i, :] <- factor[i] w[i, :]      dim 1: w[:, j] <- factor[j] w[:, j]
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, ELEMENT, Case, Tile, addresses, narrow, tiles_of, wide

TILE = Tile(8, 128)
FIELDS = tl.constexpr(5)


@triton.jit
def _shrink(table, tiles, factors, ELEMENT: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    matrix, tile = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    row = table + matrix * FIELDS
    weight = tl.load(row).to(tl.pointer_type(ELEMENT))
    height, width, by_row, place = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    across = (width + TILE.columns - 1) // TILE.columns
    i = tile // across * TILE.rows + tl.arange(0, TILE.rows)[:, None]
    j = tile % across * TILE.columns + tl.arange(0, TILE.columns)[None, :]
    inside = (i < height) & (j < width)  # [TILE]
    group = tl.where(by_row != 0, i, j)
    factor = tl.load(factors + place + group, mask=inside, other=1.0).to(ACC)
    # What has the factor 1 is neither read nor written.
    touched = inside & (factor != 1.0)
    value = tl.load(weight + i * width + j, mask=touched, other=0.0).to(ACC)
    value = tl.where(factor == 0.0, 0.0, value * factor)
    tl.store(weight + i * width + j, narrow(value, ELEMENT), mask=touched)


def prox_shrink(weights: list[Tensor], factors: Tensor, dims: list[int]) -> None:
    """Scales contiguous weights of one dtype by `factors` in statistics dtype."""
    fields, counts, place = [], [], 0
    for w, dim in zip(weights, dims, strict=True):
        height, width = w.shape if w.dim() == 2 else (1, w.shape[0])
        fields.append((w.data_ptr(), height, width, int(w.dim() == 2 and dim == 0), place))
        counts.append(triton.cdiv(height, TILE.rows) * triton.cdiv(width, TILE.columns))
        place += w.shape[dim]
    if sum(counts):
        device = factors.device
        _shrink[(sum(counts),)](
            addresses(tuple(fields), device), tiles_of(tuple(counts), device), factors,
            ELEMENT=ELEMENT[weights[0].dtype], ACC=wide(weights[0].dtype), TILE=TILE,
        )  # fmt: skip


def cases() -> list[Case]:
    """Everything `prox_shrink` can launch."""
    found = []
    for dtype in DTYPES:
        signature = {"table": "*i64", "tiles": "*i32", "factors": f"*{wide(dtype)}"}
        constants = {"ELEMENT": ELEMENT[dtype], "ACC": wide(dtype), "TILE": TILE}
        found.append(Case(_shrink, str(ELEMENT[dtype]), signature, constants))
    return found

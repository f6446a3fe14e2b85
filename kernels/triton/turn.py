"""Rotary positions on Triton: packed q and k turned in place, or their gradients turned back.

    q_i <- q_i cos_i + q_j sin_i,   back: q_i <- q_i cos_i + q_j sin_j,   j the dim that i is turned with

A program owns all dims of one head for a few tokens and goes through a few images, so that what it reads of
the tables serves q and k of all of them. It holds every number before it writes one.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import WIDTHS
from .attention_head import FIELDS
from .launch import DTYPES, ELEMENT, Case, eights, narrow, wide

NUMBERS = tl.constexpr(2048)  # in a tile
IMAGES = 4  # that a program goes through where they share their tables


class Tables(NamedTuple):
    """Cosine and sine of one tile, and the place of the dim that each is turned with."""

    cosine: tl.tensor
    sine: tl.tensor
    other: tl.tensor


@triton.jit
def _turned(base, tables, token, stride, width, N, TOKENS: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr):
    dim = tl.arange(0, E)
    inside = (token < N)[:, None] & (dim < width)[None, :]
    place = base + token[:, None] * stride + dim[None, :]
    t = tl.load(place, mask=inside, other=0.0).to(ACC)  # [TOKENS, E]
    t = t * tables.cosine + tl.gather(t, tables.other, 1) * tables.sine
    tl.store(place, narrow(t, base.dtype.element_ty), mask=inside)


# What is kept decides where in one buffer its lists begin.
@triton.jit(
    do_not_specialize=("N", "images", "stride", "n_heads", "K", "table_images", "table_heads"),
    do_not_specialize_on_alignment=("table", "rows", "whole_rows"),
)
def _turn(qkv, table, rows, whole_rows, partner, turn, N, images, stride, n_heads, K, table_images,
          table_heads, BACK: tl.constexpr, IMAGES: tl.constexpr, TOKENS: tl.constexpr, E: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    tiles = (N + TOKENS - 1) // TOKENS
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row, first = table + rest % n_heads * FIELDS, rest // n_heads * IMAGES
    q, k, width = eights(tl.load(row)), eights(tl.load(row + 1)), eights(tl.load(row + 4))
    stride, length = eights(stride), (N + 15) // 16 * 16
    token, dim = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, E)
    # Which row of the weight, and so which dim of which head, each packed column is; -1 is padding.
    source = tl.load(rows + q + dim, mask=dim < width, other=-1)
    kept = source >= 0
    head, own = tl.where(kept, source // K, 0), tl.where(kept, source % K, 0)
    with_dim = tl.load(partner + own).to(tl.int32)
    other = tl.load(whole_rows + head * K + with_dim, mask=kept, other=-1) - q
    other = tl.where((other >= 0) & (other < width), other, dim)
    # [2, table_images, table_heads, K, length]
    image, head_place = tl.where(table_images > 1, first, 0), tl.where(table_heads > 1, head, 0)
    line = image.to(tl.int64) * table_heads + head_place
    size = table_images.to(tl.int64) * table_heads * K * length
    inside = (token < N)[:, None] & kept[None, :]
    cosine = tl.load(turn + ((line * K + own) * length)[None, :] + token[:, None], mask=inside, other=0.0)
    line = line * K + (with_dim if BACK else own)
    sine = tl.load(turn + size + (line * length)[None, :] + token[:, None], mask=inside, other=0.0)
    tables = Tables(cosine.to(ACC), sine.to(ACC), tl.broadcast_to(other[None, :], (TOKENS, E)))
    base = qkv + first.to(tl.int64) * N * stride
    for _ in range(first, tl.minimum(first + IMAGES, images)):
        _turned(base + q, tables, token, stride, width, N, TOKENS, E, ACC)
        _turned(base + k, tables, token, stride, width, N, TOKENS, E, ACC)
        base += N * stride


def _shape(width: int, dtype: torch.dtype, shared: bool, back: bool) -> dict[str, object]:
    """The compile-time arguments for heads so wide."""
    images, tokens = IMAGES if shared else 1, NUMBERS.value // width
    return {"BACK": back, "IMAGES": images, "TOKENS": tokens, "E": width, "ACC": wide(dtype)}


def turn(
    qkv: Tensor, table: Tensor, counts: list[int], tokens: int, rows: Tensor, whole_rows: Tensor,
    partner: Tensor, tables: Tensor, back: bool,
) -> None:  # fmt: skip
    """Turns q and k of `qkv` [M, S], or where `back` their gradients, by `Positions.turn`; one launch.

    table and counts as of `attention_core`; rows, whole_rows: of `KeptHeads`.
    """
    images, h = qkv.shape[0] // tokens, table.shape[0]
    width = max((width for width, count in zip(WIDTHS, counts, strict=True) if count), default=0)
    if images and width:
        shape = _shape(width, qkv.dtype, tables.shape[1] == 1, back)
        programs = triton.cdiv(tokens, shape["TOKENS"]) * h * triton.cdiv(images, shape["IMAGES"])
        numbers = tokens, images, qkv.stride(0), h, whole_rows.shape[2], *tables.shape[1:3]
        _turn[(programs,)](qkv, table, rows, whole_rows, partner, tables, *numbers, **shape)


def cases() -> list[Case]:
    """Everything `turn` can launch for tables of the dtype of x, or in float32."""
    found = []
    for dtype, width, shared, back in itertools.product(DTYPES, WIDTHS, (True, False), (True, False)):
        for of_tables in dict.fromkeys((dtype, torch.float32)):
            types = dict.fromkeys(("table", "rows", "whole_rows"), "i32") | {"partner": "i64"}
            types |= {"qkv": ELEMENT[dtype], "turn": ELEMENT[of_tables]}
            names = _turn.arg_names[:-5]
            signature = {name: f"*{types[name]}" if name in types else "i32" for name in names}
            label = f"{ELEMENT[dtype]} by {ELEMENT[of_tables]} width {width}"
            label += f"{' of images' * (not shared)}{' back' * back}"
            found.append(Case(_turn, label, signature, _shape(width, dtype, shared, back)))
    return found

"""What the attention kernels share: one head of one image, its tokens, its scores."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, eights, narrow, wide

FIELDS = tl.constexpr(6)  # columns of the table that `head_of` reads
LOG2E = tl.constexpr(1.4426950408889634)


class Mode(NamedTuple):
    """What is compiled in: accumulator type, precision of float32 products, tile width E, scale."""

    acc: tl.dtype
    precision: str
    width: int
    scale: float


def mode_of(width: int, scale: float, dtype: torch.dtype) -> Mode:
    """The mode of heads so wide; float32 tiles are multiplied as the user lets torch multiply matrices."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return Mode(wide(dtype), "tf32" if tf32 else "ieee", width, scale)


class Head(NamedTuple):
    """One head of one image: pointers to its first token, strides of a token, widths, places in `qkv`."""

    q: tl.tensor
    k: tl.tensor
    v: tl.tensor
    out: tl.tensor
    grad_out: tl.tensor
    top: tl.tensor
    inverse: tl.tensor
    qkv_stride: tl.tensor
    heads_stride: tl.tensor
    qk_width: tl.tensor
    v_width: tl.tensor
    q_place: tl.tensor
    k_place: tl.tensor
    v_place: tl.tensor


# Specialised on none of them, a kernel serves every structure without being compiled again.
NUMBERS = ("N", "M", "qkv_stride", "heads_stride", "n_heads", "first_head")


@triton.jit
def dot(a, b, MODE: tl.constexpr):
    # The interpreter (of Triton 3.9) multiplies the bits of bfloat16 tiles as integers. And its sums depend
    # on the shapes of tiles, where a GPU adds up each number in the order of k: the backward pass wants to
    # compute the very scores of the forward pass again. Summed in float64, they are the same.
    if INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(MODE.acc)
    return tl.dot(a, b, input_precision=MODE.precision, out_dtype=MODE.acc)


@triton.jit
def load(base, first, stride, width, N, ROWS: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr):
    # Tokens first.. of one head [ROWS, E]; zeros behind the head's width and, unless WHOLE, behind token N.
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, E)
    inside = (dim < width)[None, :]
    if not WHOLE:
        inside = inside & (row < N)[:, None]
    return tl.load(base + row[:, None] * stride + dim[None, :], mask=inside, other=0.0)


@triton.jit
def store(base, value, first, stride, width, N, ROWS: tl.constexpr, E: tl.constexpr):
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, E)
    inside = (row < N)[:, None] & (dim < width)[None, :]
    place = base + row[:, None] * stride + dim[None, :]
    tl.store(place, narrow(value, base.dtype.element_ty), mask=inside)


@triton.jit
def scores(q, k, MODE: tl.constexpr):
    # Without the size of the scale, which `power` applies: rounding it here costs large scores digits.
    s = dot(q, tl.trans(k), MODE)
    return -s if MODE.scale < 0 else s


@triton.jit
def by_of(MODE: tl.constexpr):
    # Factor of a score in the exponent of 2.
    return (MODE.scale if MODE.scale > 0 else -MODE.scale) * LOG2E


@triton.jit
def power(s, top, axis: tl.constexpr, MODE: tl.constexpr):
    # exp(|scale| (s - top)), top one number for each row (axis 1) or column (axis 0).
    return tl.exp2((s - tl.expand_dims(top, axis)) * by_of(MODE))


@triton.jit
def head_of(
    qkv, heads, grad_heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride, heads_stride
):
    # The `Head` of one (image, head); all starts and widths are multiples of 8.
    head, image = first_head + pair % n_heads, pair // n_heads
    qkv_stride, heads_stride = eights(qkv_stride), eights(heads_stride)
    row = table + head * FIELDS
    first = image.to(tl.int64) * N
    q = first * qkv_stride + eights(tl.load(row))
    k = first * qkv_stride + eights(tl.load(row + 1))
    v = first * qkv_stride + eights(tl.load(row + 2))
    out = first * heads_stride + eights(tl.load(row + 3))
    qk_width, v_width = eights(tl.load(row + 4)), eights(tl.load(row + 5))
    line = head.to(tl.int64) * M + first
    return Head(
        qkv + q, qkv + k, qkv + v, heads + out, grad_heads + out, top + line, inverse + line,
        qkv_stride, heads_stride, qk_width, v_width, q, k, v,
    )  # fmt: skip

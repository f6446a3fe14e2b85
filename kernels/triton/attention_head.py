"""What the attention kernels share: one head of one image, its tokens, its scores."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, eights, narrow, wide

FIELDS = tl.constexpr(6)  # columns of the table that `head_of` reads
LOG2E = tl.constexpr(1.4426950408889634)


class Mode(NamedTuple):
    """What is compiled in: accumulator type, precision of float32 products, tile width E, scale, and whether
    a bias is added to the scores.
    """

    acc: tl.dtype
    precision: str
    width: int
    scale: float
    biased: bool = False


def mode_of(width: int, scale: float, dtype: torch.dtype, biased: bool = False) -> Mode:
    """The mode of heads so wide; float32 tiles are multiplied as the user lets torch multiply matrices."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return Mode(wide(dtype), "tf32" if tf32 else "ieee", width, scale, biased)


def is_hopper(device: torch.device) -> bool:
    """Whether the tensor cores read what they multiply from shared memory: Hopper or later."""
    if INTERPRETED.value or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


class Bias(NamedTuple):
    """What kernels take of a bias of the scores, behind their other numbers; None: no argument at all.

    bias [P, heads, N, N up to a multiple of 8]: that of image i is i % P, `heads` all kept ones or 1. order:
    int32 [h], which of the kept heads each row of the table is.
    """

    bias: Tensor | None = None
    order: Tensor | None = None
    n_biases: int | None = None
    bias_heads: int | None = None


NO_BIAS = Bias()


def bias_of(bias: Tensor | None, order: Tensor | None) -> Bias:
    """The arguments for this bias."""
    return NO_BIAS if bias is None else Bias(bias, order, *bias.shape[:2])


def signature_of(names: Sequence[str], types: dict[str, object], biased: bool) -> dict[str, str]:
    """How the compile gate is told of a kernel's arguments; those of a missing bias are constants."""
    types = {"order": "i32", **types}
    given = [name for name in names if biased or name not in Bias._fields]
    return {name: f"*{types[name]}" if name in types else "i32" for name in given}


def missing(biased: bool) -> dict[str, None]:
    """The constants that stand for a missing bias in the compile gate."""
    return {} if biased else dict.fromkeys(Bias._fields)


class Head(NamedTuple):
    """One head of one image: pointers to its first token, strides of a token, widths, places in `qkv`."""

    q: tl.tensor
    k: tl.tensor
    v: tl.tensor
    out: tl.tensor
    grad_out: tl.tensor
    top: tl.tensor
    inverse: tl.tensor
    bias: tl.tensor
    qkv_stride: tl.tensor
    heads_stride: tl.tensor
    qk_width: tl.tensor
    v_width: tl.tensor
    q_place: tl.tensor
    k_place: tl.tensor
    v_place: tl.tensor


# Specialised on none of them, a kernel serves every structure without being compiled again.
NUMBERS = ("N", "M", "qkv_stride", "heads_stride", "n_heads", "first_head", *Bias._fields[2:])


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
    # Without a bias: without the size of the scale, which `power` applies, as rounding it here costs large
    # scores digits.
    s = dot(q, tl.trans(k), MODE)
    return s if MODE.biased or MODE.scale >= 0 else -s


@triton.jit
def plus_bias(s, head, query, key, N, MODE: tl.constexpr):
    # The whole score where there is a bias; query and key: the places of a tile's rows and columns, or of its
    # columns and rows, [R, 1] and [1, C].
    width = (N + 7) // 8 * 8
    added = tl.load(head.bias + query * width + key, mask=(query < N) & (key < width), other=0.0)
    return tl.fma(s, MODE.scale, added.to(MODE.acc))


@triton.jit
def by_of(MODE: tl.constexpr):
    # Factor of a score in the exponent of 2.
    return LOG2E if MODE.biased else (MODE.scale if MODE.scale > 0 else -MODE.scale) * LOG2E


@triton.jit
def power(s, top, axis: tl.constexpr, MODE: tl.constexpr):
    # exp(|scale| (s - top)), of whole scores exp(s - top); top: a number for each row (axis 1) or column (0).
    return tl.exp2((s - tl.expand_dims(top, axis)) * by_of(MODE))


@triton.jit
def head_of(
    qkv, heads, grad_heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride, heads_stride,
    bias, order, n_biases, bias_heads, MODE: tl.constexpr,
):  # fmt: skip
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
    added = qkv
    if MODE.biased:
        place = (image % n_biases).to(tl.int64) * bias_heads
        place += tl.where(bias_heads > 1, tl.load(order + head), 0)
        added = bias + place * N * ((N + 7) // 8 * 8)
    return Head(
        qkv + q, qkv + k, qkv + v, heads + out, grad_heads + out, top + line, inverse + line, added,
        qkv_stride, heads_stride, qk_width, v_width, q, k, v,
    )  # fmt: skip

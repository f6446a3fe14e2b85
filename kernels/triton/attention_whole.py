"""Attention of one head of one image in one program, for up to 256 tokens of 16-bit numbers.

The formulas are those of `attention_core`. A query sees its whole row of scores at once, so the softmax needs
no second look; everything is read once. The backward pass holds all keys, with their dk and dv, and goes
through the queries: it multiplies five tiles where two passes, for dk and dv and for dq, multiply seven.
"""

import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_head import (
    NUMBERS,
    Mode,
    by_of,
    dot,
    head_of,
    is_hopper,
    load,
    missing,
    mode_of,
    plus_bias,
    power,
    scores,
    signature_of,
    store,
)
from .launch import DTYPES, ELEMENT, INTERPRETED, Case, narrow, wide


class KeyTiles(NamedTuple):
    """How many keys are in each tile of the forward pass."""

    first: int
    second: int = 0
    third: int = 0


class Keys(NamedTuple):
    """k and v of one tile of keys."""

    k: tl.tensor
    v: tl.tensor


# For so many tokens; what is behind the first tile is masked.
TILES = {64: KeyTiles(64), 128: KeyTiles(128), 208: KeyTiles(128, 64, 16), 256: KeyTiles(128, 128)}
MOST_BIASED = 128  # tokens in the forward pass where a bias is added
ROWS = tl.constexpr(64)  # queries in a tile of the forward pass


@triton.jit
def _keys(head, first, N, COLS: tl.constexpr, MODE: tl.constexpr):
    k = load(head.k, first, head.qkv_stride, head.qk_width, N, COLS, MODE.width, False)
    return Keys(k, load(head.v, first, head.qkv_stride, head.v_width, N, COLS, MODE.width, False))


@triton.jit
def _row(head, q, k, query, first, N, COLS: tl.constexpr, WHOLE: tl.constexpr, MODE: tl.constexpr):
    s, key = scores(q, k, MODE), first + tl.arange(0, COLS)  # [ROWS, COLS]
    if MODE.biased:
        s = plus_bias(s, head, query[:, None], key[None, :], N, MODE)
    if not WHOLE:
        s = tl.where((key < N)[None, :], s, float("-inf"))
    return s


@triton.jit
def _attend(head, keys0, keys1, keys2, first, N, ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
            MODE: tl.constexpr):  # fmt: skip
    # The output of one tile of queries.
    q = load(head.q, first, head.qkv_stride, head.qk_width, N, ROWS, MODE.width, False)
    row = first + tl.arange(0, ROWS)
    s0 = _row(head, q, keys0.k, row, 0, N, KEYS.first, WHOLE, MODE)
    top = tl.max(s0, 1)
    if KEYS.second > 0:
        s1 = _row(head, q, keys1.k, row, KEYS.first, N, KEYS.second, False, MODE)
        top = tl.maximum(top, tl.max(s1, 1))
    if KEYS.third > 0:
        s2 = _row(head, q, keys2.k, row, KEYS.first + KEYS.second, N, KEYS.third, False, MODE)
        top = tl.maximum(top, tl.max(s2, 1))
    p = power(s0, top, 1, MODE)
    total = tl.sum(p, 1)
    acc = dot(narrow(p, q.dtype), keys0.v, MODE)
    if KEYS.second > 0:
        p = power(s1, top, 1, MODE)
        total += tl.sum(p, 1)
        acc += dot(narrow(p, q.dtype), keys1.v, MODE)
    if KEYS.third > 0:
        p = power(s2, top, 1, MODE)
        total += tl.sum(p, 1)
        acc += dot(narrow(p, q.dtype), keys2.v, MODE)
    inverse = 1.0 / total
    store(head.out, acc * inverse[:, None], first, head.heads_stride, head.v_width, N, ROWS, MODE.width)
    tl.store(head.top + row, top, mask=row < N)
    tl.store(head.inverse + row, inverse, mask=row < N)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=("order",))
def _forward(qkv, heads, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads, first_head, bias,
             order, n_biases, bias_heads, KEYS: tl.constexpr, WHOLE: tl.constexpr,
             MODE: tl.constexpr):  # fmt: skip
    head = head_of(
        qkv, heads, heads, top, inverse, table, tl.program_id(0), n_heads, first_head, N, M, qkv_stride,
        heads_stride, bias, order, n_biases, bias_heads, MODE,
    )  # fmt: skip
    keys0 = _keys(head, 0, N, KEYS.first, MODE)
    keys1 = keys0
    keys2 = keys0
    if KEYS.second > 0:
        keys1 = _keys(head, KEYS.first, N, KEYS.second, MODE)
    if KEYS.third > 0:
        keys2 = _keys(head, KEYS.first + KEYS.second, N, KEYS.third, MODE)
    for first in range(0, N, ROWS):
        _attend(head, keys0, keys1, keys2, first, N, ROWS, KEYS, WHOLE, MODE)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=("order",))
def _backward(qkv, heads, grad_heads, grad_qkv, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads,
              first_head, bias, order, n_biases, bias_heads, KEYS: tl.constexpr, STEP: tl.constexpr,
              MODE: tl.constexpr):  # fmt: skip
    # All keys at once, STEP queries at a time; tiles of P and dS are [KEYS, STEP]. dq is made transposed,
    # [E, STEP]: a product of 64 rows, as tensor cores want it.
    head = head_of(
        qkv, heads, grad_heads, top, inverse, table, tl.program_id(0), n_heads, first_head, N, M, qkv_stride,
        heads_stride, bias, order, n_biases, bias_heads, MODE,
    )  # fmt: skip
    keys = _keys(head, 0, N, KEYS, MODE)
    k, v = keys.k, keys.v
    grad_k, grad_v = tl.full((KEYS, MODE.width), 0.0, MODE.acc), tl.full((KEYS, MODE.width), 0.0, MODE.acc)
    for first in range(0, N, STEP):
        q = load(head.q, first, head.qkv_stride, head.qk_width, N, STEP, MODE.width, False)
        o = load(head.out, first, head.heads_stride, head.v_width, N, STEP, MODE.width, False)
        grad = load(head.grad_out, first, head.heads_stride, head.v_width, N, STEP, MODE.width, False)
        delta = tl.sum(o.to(MODE.acc) * grad.to(MODE.acc), 1)
        row = first + tl.arange(0, STEP)
        # Behind the last token P = 0.
        high = tl.load(head.top + row, mask=row < N, other=float("inf"))
        shift = high * by_of(MODE) - tl.log2(tl.load(head.inverse + row, mask=row < N, other=1.0))
        # P is at most 1, but for what stands behind the last key, whose zeros must not meet an infinity.
        s = scores(k, q, MODE)
        if MODE.biased:
            s = plus_bias(s, head, row[None, :], tl.arange(0, KEYS)[:, None], N, MODE)
        p = tl.exp2(tl.minimum(tl.fma(s, by_of(MODE), -shift[None, :]), 0.0))
        grad_v += dot(narrow(p, v.dtype), grad, MODE)
        grad_s = p * (dot(v, tl.trans(grad), MODE) - delta[None, :])
        grad_s = narrow(grad_s, k.dtype)
        grad_k += dot(grad_s, q, MODE)
        grad_q = tl.trans(dot(tl.trans(k), grad_s, MODE)) * MODE.scale
        store(grad_qkv + head.q_place, grad_q, first, head.qkv_stride, head.qk_width, N, STEP, MODE.width)
    store(
        grad_qkv + head.k_place, grad_k * MODE.scale, 0, head.qkv_stride, head.qk_width, N, KEYS, MODE.width
    )
    store(grad_qkv + head.v_place, grad_v, 0, head.qkv_stride, head.v_width, N, KEYS, MODE.width)


def fits(tokens: int, width: int, tensor: Tensor, backward: bool, biased: bool) -> bool:
    """Whether these kernels serve so many tokens of heads so wide, on the tensor's device.

    The backward pass and the longest rows need the tensor cores of Hopper or later, which read what they
    multiply from shared memory: elsewhere they would spill registers, as would long rows with a bias.
    """
    most = MOST_BIASED if biased and not backward else max(TILES)
    if tokens > most or width > 64 or tensor.dtype.itemsize != 2:
        return False
    return INTERPRETED.value or (tokens <= 208 and not backward) or is_hopper(tensor.device)


def forward(tensors: tuple[Tensor, ...], numbers: tuple[int, ...], programs: int, mode: Mode) -> None:
    """One launch of `programs` (image, head) pairs; arguments as `attention_core` lays them out."""
    _forward[(programs,)](*tensors, *numbers, **_forward_shape(numbers[0], mode), num_warps=4, num_stages=2)


def backward(tensors: tuple[Tensor, ...], numbers: tuple[int, ...], programs: int, mode: Mode) -> None:
    """The same of the backward pass."""
    shape, options = _backward_shape(numbers[0], mode)
    _backward[(programs,)](*tensors, *numbers, **shape, **options)


def _forward_shape(tokens: int, mode: Mode) -> dict[str, object]:
    most = next(n for n in TILES if n >= tokens)
    return {"KEYS": TILES[most], "WHOLE": most > 128, "MODE": mode}


def _backward_shape(tokens: int, mode: Mode) -> tuple[dict[str, object], dict[str, int]]:
    keys = next(n for n in (64, 128, 256) if n >= tokens)
    # Beside 256 keys of 64 dims there are registers for 16 queries; with 32, Triton 3.6 to 3.8 spill. So do
    # four warps with 64 keys and queries of 64 dims and their bias.
    step = 64 if keys < 256 else 16 if mode.width == 64 else 32
    step = 32 if mode.biased and mode.width == 64 and keys == 64 else step
    shape = {"KEYS": keys, "STEP": step, "MODE": mode}
    return shape, {"num_warps": 4 if keys == 64 else 8, "num_stages": 2}


def cases() -> list[Case]:
    """Everything the two can launch, at the scale of 64 dims."""
    found = []
    for dtype, width, tokens, biased in itertools.product(DTYPES[:2], (16, 32, 64), TILES, (False, True)):
        mode = mode_of(width, 0.125, dtype, biased)
        types = {"top": wide(dtype), "inverse": wide(dtype), "table": "i32"}
        types |= dict.fromkeys(("qkv", "heads", "grad_heads", "grad_qkv", "bias"), ELEMENT[dtype])
        hopper = ("sm_90", "sm_100")
        options, where = {"num_warps": 4, "num_stages": 2}, hopper if tokens > 208 else ()
        jobs = []
        if tokens <= MOST_BIASED or not biased:
            jobs.append((_forward, tokens, _forward_shape(tokens, mode), options, where))
        if tokens != 208:
            jobs.append((_backward, tokens, *_backward_shape(tokens, mode), hopper))
        for kernel, most, shape, options, targets in jobs:
            signature = signature_of([name for name in kernel.arg_names if name not in shape], types, biased)
            label = f"{ELEMENT[dtype]} width {width} tokens {most}{' bias' * biased}"
            both = {False: options, True: options}
            found.append(Case(kernel, label, signature, shape | missing(biased), both, True, targets))
    return found

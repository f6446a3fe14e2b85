"""The attention core on Triton: softmax attention of every kept head of every image, forward and backward.

    S = scale q k^T,  P = exp(S - top) / sum,  o = P v
    dP = do v^T,  dS = P * (dP - rowsum(do * o)),  dv = P^T do,  dk = scale dS^T q,  dq = scale dS k

B images, N tokens, M = B*N, E tile width of a head's dims. The last N % 64 tokens run in a tile of 16 where
they fit: 197 tokens cost 208, not 256. Exponents are of base 2 inside; `top` and `inverse` = 1 / sum stay
apart, as a log of the sum would round at the size of top.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kept import WIDTHS
from .launch import DTYPES, ELEMENT, INTERPRETED, Case, dot_precision, eights, narrow, wide

SMALL = 16  # tokens in the last tile when so few are left
FIELDS = tl.constexpr(6)  # columns of the table that `_head` reads
HIP = torch.version.hip is not None
# Specialised on none of them, a kernel serves every structure without being compiled again.
NUMBERS = ("N", "M", "qkv_stride", "heads_stride", "n_heads", "first_head")
LOG2E = tl.constexpr(1.4426950408889634)

# Two bundles travel through the kernels:
#   head = pointers to the first token's q, k, v, o, do, top, inverse; strides of a token in qkv and in heads;
#          widths of q/k and of v
#   MODE = tile width E, scale, accumulator type, precision of float32 products


@triton.jit
def _load(base, first, stride, width, N, ROWS: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr):
    # Tokens first.. of one head [ROWS, E]; zeros behind the head's width and, unless WHOLE, behind token N.
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, E)
    inside = (dim < width)[None, :]
    if not WHOLE:
        inside = inside & (row < N)[:, None]
    return tl.load(base + row[:, None] * stride + dim[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, value, first, stride, width, N, ROWS: tl.constexpr, E: tl.constexpr):
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, E)
    inside = (row < N)[:, None] & (dim < width)[None, :]
    place = base + row[:, None] * stride + dim[None, :]
    tl.store(place, narrow(value, base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, MODE: tl.constexpr):
    # The interpreter (of Triton 3.9) multiplies the bits of bfloat16 tiles as integers.
    if INTERPRETED:
        a, b = a.to(MODE[2]), b.to(MODE[2])
    return tl.dot(a, b, input_precision=MODE[3], out_dtype=MODE[2])


@triton.jit
def _scores(q, k, MODE: tl.constexpr):
    return _dot(q, tl.trans(k), MODE) * (MODE[1] * LOG2E)


@triton.jit
def _head(
    qkv, heads, grad_heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride, heads_stride
):
    # The bundle of one (image, head) and its places in `qkv`; all starts and widths are multiples of 8.
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
    bundle = (qkv + q, qkv + k, qkv + v, heads + out, grad_heads + out, top + line, inverse + line,
              qkv_stride, heads_stride, qk_width, v_width)  # fmt: skip
    return bundle, q, k, v


@triton.jit
def _join(acc, top, total, q, head, start, N, COLS: tl.constexpr, MODE: tl.constexpr, WHOLE: tl.constexpr):
    # One block of keys joins the running softmax of some queries.
    k = _load(head[1], start, head[7], head[9], N, COLS, MODE[0], WHOLE)
    v = _load(head[2], start, head[7], head[10], N, COLS, MODE[0], WHOLE)
    s = _scores(q, k, MODE)  # [ROWS, COLS]
    if not WHOLE:
        s = tl.where((start + tl.arange(0, COLS) < N)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    fade = tl.exp2(top - new_top)
    return acc * fade[:, None] + _dot(narrow(p, v.dtype), v, MODE), new_top, total * fade + tl.sum(p, 1)


@triton.jit
def _attend(head, first, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, MODE: tl.constexpr):
    # The output of one tile of queries.
    q = _load(head[0], first, head[7], head[9], N, ROWS, MODE[0], False)
    acc = tl.full((ROWS, MODE[0]), 0.0, MODE[2])
    top, total = tl.full((ROWS,), float("-inf"), MODE[2]), tl.full((ROWS,), 0.0, MODE[2])
    last = (N - 1) // BLOCK * BLOCK
    for start in range(0, last, BLOCK):
        acc, top, total = _join(acc, top, total, q, head, start, N, BLOCK, MODE, True)
    acc, top, total = _join(acc, top, total, q, head, last, N, TAIL, MODE, False)
    _store(head[3], acc / total[:, None], first, head[8], head[10], N, ROWS, MODE[0])
    row = first + tl.arange(0, ROWS)
    tl.store(head[5] + row, top, mask=row < N)
    tl.store(head[6] + row, 1.0 / total, mask=row < N)


@triton.jit(do_not_specialize=NUMBERS)
def _forward(qkv, heads, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads, first_head,
             BLOCK: tl.constexpr, TAIL: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    tiles = (N + BLOCK - 1) // BLOCK
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, _, _, _ = _head(
        qkv, heads, heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride, heads_stride
    )
    if head[10] == 0:  # no head: only an envelope has such rows
        return
    if TAIL == BLOCK or tile + 1 < tiles:
        _attend(head, tile * BLOCK, N, BLOCK, BLOCK, TAIL, MODE)
    else:
        _attend(head, tile * BLOCK, N, TAIL, BLOCK, TAIL, MODE)


@triton.jit
def _rows_of(head, start, N, ROWS: tl.constexpr, MODE: tl.constexpr):
    # What the backward pass reads of some queries; those behind the last token weigh nothing.
    q = _load(head[0], start, head[7], head[9], N, ROWS, MODE[0], False)
    o = _load(head[3], start, head[8], head[10], N, ROWS, MODE[0], False)
    grad = _load(head[4], start, head[8], head[10], N, ROWS, MODE[0], False)
    row = start + tl.arange(0, ROWS)
    top = tl.load(head[5] + row, mask=row < N, other=0.0)
    inverse = tl.load(head[6] + row, mask=row < N, other=0.0)
    return q, grad, top, inverse, tl.sum(o.to(MODE[2]) * grad.to(MODE[2]), 1)


@triton.jit
def _backward_keys(head, grad_k_out, grad_v_out, first, N, COLS: tl.constexpr, STEP: tl.constexpr,
                   MODE: tl.constexpr):  # fmt: skip
    # dk and dv of one tile of keys; the tiles of P and dS are [keys, queries]. Keys behind the last token are
    # zero rows whose results nobody stores.
    k = _load(head[1], first, head[7], head[9], N, COLS, MODE[0], False)
    v = _load(head[2], first, head[7], head[10], N, COLS, MODE[0], False)
    grad_k, grad_v = tl.full((COLS, MODE[0]), 0.0, MODE[2]), tl.full((COLS, MODE[0]), 0.0, MODE[2])
    for start in range(0, N, STEP):
        q, grad, top, inverse, delta = _rows_of(head, start, N, STEP, MODE)
        p = tl.exp2(_scores(k, q, MODE) - top[None, :]) * inverse[None, :]  # [COLS, STEP]
        grad_v += _dot(narrow(p, v.dtype), grad, MODE)
        grad_s = p * (_dot(v, tl.trans(grad), MODE) - delta[None, :])
        grad_k += _dot(narrow(grad_s, k.dtype), q, MODE)
    _store(grad_k_out, grad_k * MODE[1], first, head[7], head[9], N, COLS, MODE[0])
    _store(grad_v_out, grad_v, first, head[7], head[10], N, COLS, MODE[0])


@triton.jit
def _backward_queries(head, grad_q_out, first, N, ROWS: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr):
    # dq of one tile of queries.
    q, grad, top, inverse, delta = _rows_of(head, first, N, ROWS, MODE)
    grad_q = tl.full((ROWS, MODE[0]), 0.0, MODE[2])
    for start in range(0, N, STEP):
        k = _load(head[1], start, head[7], head[9], N, STEP, MODE[0], False)
        v = _load(head[2], start, head[7], head[10], N, STEP, MODE[0], False)
        s = tl.where((start + tl.arange(0, STEP) < N)[None, :], _scores(q, k, MODE), float("-inf"))
        p = tl.exp2(s - top[:, None]) * inverse[:, None]  # [ROWS, STEP]
        grad_s = p * (_dot(grad, tl.trans(v), MODE) - delta[:, None])
        grad_q += _dot(narrow(grad_s, k.dtype), k, MODE)
    _store(grad_q_out, grad_q * MODE[1], first, head[7], head[9], N, ROWS, MODE[0])


@triton.jit(do_not_specialize=NUMBERS)
def _backward(qkv, heads, grad_heads, grad_qkv, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads,
              first_head, BLOCK: tl.constexpr, TAIL: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    # A program owns either the dk and dv of one tile of keys or the dq of one tile of queries: nothing is
    # written twice, so there are no atomics and every run adds up in the same order. The inner loops go in
    # steps of half a tile: a step of a whole one, or a shorter last step, spills registers.
    STEP: tl.constexpr = BLOCK // 2 if BLOCK > 16 else 16
    tiles = (N + BLOCK - 1) // BLOCK
    part, pair = tl.program_id(0) % (2 * tiles), tl.program_id(0) // (2 * tiles)
    head, q, k, v = _head(
        qkv, heads, grad_heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride, heads_stride
    )
    if head[10] == 0:
        return
    first = part // 2 * BLOCK
    if part % 2 == 0:
        if TAIL == BLOCK or first + BLOCK < N:
            _backward_keys(head, grad_qkv + k, grad_qkv + v, first, N, BLOCK, STEP, MODE)
        else:
            _backward_keys(head, grad_qkv + k, grad_qkv + v, first, N, TAIL, STEP, MODE)
    else:
        if TAIL == BLOCK or first + BLOCK < N:
            _backward_queries(head, grad_qkv + q, first, N, BLOCK, STEP, MODE)
        else:
            _backward_queries(head, grad_qkv + q, first, N, TAIL, STEP, MODE)


def _block(dtype: torch.dtype, width: int) -> int:
    """Tokens in a tile: what tensor cores want, less where float32 tiles would leave the registers."""
    if dtype.itemsize == 2:
        return 64
    return 32 if width < 128 else 16


def _options(width: int, dtype: torch.dtype, hip: bool) -> dict[str, int]:
    # AMD's warps are twice as wide, and its threads have twice the registers.
    return {"num_warps": 8 if width * dtype.itemsize > 128 and not hip else 4, "num_stages": 2}


def _shape(tokens: int, width: int, scale: float, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments for so many tokens."""
    block = _block(dtype, width)
    tail = SMALL if (tokens - 1) % block < SMALL else block
    return {"BLOCK": block, "TAIL": tail, "MODE": (width, scale, wide(dtype), dot_precision(dtype))}


def attention_core(
    qkv: Tensor, table: Tensor, counts: list[int], tokens: int, scale: float, heads: Tensor, top: Tensor,
    inverse: Tensor,
) -> None:  # fmt: skip
    """Writes `heads` [M, V] and the softmax statistics `top`, `inverse` [h, M] from the packed `qkv` [M, S].

    table: int32 [h, 6], per kept head the columns of its q, k, v in `qkv` and of its v in `heads`, and its
    q/k and v widths, all multiples of 8; counts: how many of its rows, in order, are as wide as each of
    `WIDTHS`.
    """
    _launch(_forward, (qkv, heads, top, inverse, table), counts, tokens, scale, 1)


def attention_core_backward(
    qkv: Tensor, heads: Tensor, grad_heads: Tensor, top: Tensor, inverse: Tensor, table: Tensor,
    counts: list[int], tokens: int, scale: float, grad_qkv: Tensor,
) -> None:  # fmt: skip
    """Writes `grad_qkv` from `grad_heads` and what `attention_core` wrote."""
    _launch(_backward, (qkv, heads, grad_heads, grad_qkv, top, inverse, table), counts, tokens, scale, 2)


def _launch(kernel, tensors, counts, tokens, scale, programs_per_tile) -> None:
    qkv, heads, M = tensors[0], tensors[1], tensors[0].shape[0]
    first = 0
    for width, count in zip(WIDTHS, counts, strict=True):
        tiles = triton.cdiv(tokens, _block(qkv.dtype, width))
        if count and M:
            kernel[(count * (M // tokens) * tiles * programs_per_tile,)](
                *tensors, tokens, M, qkv.stride(0), heads.stride(0), count, first,
                **_shape(tokens, width, scale, qkv.dtype), **_options(width, qkv.dtype, HIP),
            )  # fmt: skip
        first += count


def cases() -> list[Case]:
    """Everything the two can launch, at the scale of 64 dims."""
    found = []
    for kernel, dtype, width in itertools.product((_forward, _backward), DTYPES, WIDTHS):
        types = {"top": wide(dtype), "inverse": wide(dtype), "table": "i32"}
        types |= dict.fromkeys(("qkv", "heads", "grad_heads", "grad_qkv"), ELEMENT[dtype])
        signature = {name: f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names[:-3]}
        block = _block(dtype, width)
        for tokens in (1, block) if block > SMALL else (1,):
            shape = _shape(tokens, width, 0.125, dtype)
            label = f"{ELEMENT[dtype]} width {width} tail {shape['TAIL']}"
            half = dtype.itemsize == 2
            options = {hip: _options(width, dtype, hip) for hip in (False, True)}
            found.append(Case(kernel, label, signature, shape, options, half))
    return found

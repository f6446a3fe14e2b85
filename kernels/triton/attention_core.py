"""The attention core on Triton: softmax attention of every kept head of every image, forward and backward.

    S = scale q k^T,  P = exp(S - top) / sum,  o = P v
    dP = do v^T,  dS = P * (dP - rowsum(do * o)),  dv = P^T do,  dk = scale dS^T q,  dq = scale dS k

B images, N tokens, M = B*N, E tile width of a head's dims. Up to 256 tokens of 16-bit numbers a program does
a whole head of an image (`attention_whole`); here are the kernels for the rest: a program per tile of tokens,
a running softmax. The last N % 64 tokens run in a tile of 16 where they fit: 197 tokens cost 208, not 256.
`top`, the largest score before the scale, and `inverse` = 1 / sum stay apart, as a log of the sum would round
at the size of top.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import WIDTHS
from . import attention_whole as whole
from .attention_head import (
    NUMBERS,
    Mode,
    bias_of,
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
from .launch import DTYPES, ELEMENT, Case, narrow, wide

LOWEST = tl.constexpr(-1.0e38)
SMALL = 16  # tokens in the last tile when so few are left
CROWDED, HOPPER = ("sm_80", "gfx942"), ("sm_90", "sm_100")  # in the compile gate
HIP = torch.version.hip is not None


@triton.jit
def _join(acc, top, total, q, head, first, start, N, ROWS: tl.constexpr, COLS: tl.constexpr,
          MODE: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    # One block of keys joins the running softmax of some queries.
    k = load(head.k, start, head.qkv_stride, head.qk_width, N, COLS, MODE.width, WHOLE)
    v = load(head.v, start, head.qkv_stride, head.v_width, N, COLS, MODE.width, WHOLE)
    s = scores(q, k, MODE)  # [ROWS, COLS]
    key = start + tl.arange(0, COLS)
    if MODE.biased:
        s = plus_bias(s, head, (first + tl.arange(0, ROWS))[:, None], key[None, :], N, MODE)
    if not WHOLE:
        s = tl.where((key < N)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    if MODE.biased:
        # A bias may forbid every key so far.
        new_top = tl.maximum(new_top, LOWEST)
    p = power(s, new_top, 1, MODE)
    fade = tl.exp2((top - new_top) * by_of(MODE))
    return (
        acc * fade[:, None] + dot(narrow(p, v.dtype), v, MODE),
        new_top,
        total * fade + tl.sum(p, 1),
    )


@triton.jit
def _attend(head, first, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, MODE: tl.constexpr):
    # The output of one tile of queries.
    q = load(head.q, first, head.qkv_stride, head.qk_width, N, ROWS, MODE.width, False)
    acc = tl.full((ROWS, MODE.width), 0.0, MODE.acc)
    top, total = tl.full((ROWS,), float("-inf"), MODE.acc), tl.full((ROWS,), 0.0, MODE.acc)
    last = (N - 1) // BLOCK * BLOCK
    for start in range(0, last, BLOCK):
        acc, top, total = _join(acc, top, total, q, head, first, start, N, ROWS, BLOCK, MODE, True)
    acc, top, total = _join(acc, top, total, q, head, first, last, N, ROWS, TAIL, MODE, False)
    store(head.out, acc / total[:, None], first, head.heads_stride, head.v_width, N, ROWS, MODE.width)
    row = first + tl.arange(0, ROWS)
    tl.store(head.top + row, top, mask=row < N)
    tl.store(head.inverse + row, 1.0 / total, mask=row < N)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=("order",))
def _forward(qkv, heads, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads, first_head, bias,
             order, n_biases, bias_heads, BLOCK: tl.constexpr, TAIL: tl.constexpr,
             MODE: tl.constexpr):  # fmt: skip
    tiles = (N + BLOCK - 1) // BLOCK
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head = head_of(
        qkv, heads, heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride, heads_stride,
        bias, order, n_biases, bias_heads, MODE,
    )  # fmt: skip
    if TAIL == BLOCK or tile + 1 < tiles:
        _attend(head, tile * BLOCK, N, BLOCK, BLOCK, TAIL, MODE)
    else:
        _attend(head, tile * BLOCK, N, TAIL, BLOCK, TAIL, MODE)


@triton.jit
def rows_of(head, start, N, ROWS: tl.constexpr, MODE: tl.constexpr):
    # What the backward pass reads of some queries; those behind the last token weigh nothing.
    q = load(head.q, start, head.qkv_stride, head.qk_width, N, ROWS, MODE.width, False)
    o = load(head.out, start, head.heads_stride, head.v_width, N, ROWS, MODE.width, False)
    grad = load(head.grad_out, start, head.heads_stride, head.v_width, N, ROWS, MODE.width, False)
    row = start + tl.arange(0, ROWS)
    top = tl.load(head.top + row, mask=row < N, other=0.0)
    inverse = tl.load(head.inverse + row, mask=row < N, other=0.0)
    return q, grad, top, inverse, tl.sum(o.to(MODE.acc) * grad.to(MODE.acc), 1)


@triton.jit
def _backward_keys(head, grad_k_out, grad_v_out, first, N, COLS: tl.constexpr, STEP: tl.constexpr,
                   MODE: tl.constexpr):  # fmt: skip
    # dk and dv of one tile of keys; the tiles of P and dS are [keys, queries]. Keys behind the last token are
    # zero rows whose results nobody stores.
    k = load(head.k, first, head.qkv_stride, head.qk_width, N, COLS, MODE.width, False)
    v = load(head.v, first, head.qkv_stride, head.v_width, N, COLS, MODE.width, False)
    grad_k, grad_v = tl.full((COLS, MODE.width), 0.0, MODE.acc), tl.full((COLS, MODE.width), 0.0, MODE.acc)
    for start in range(0, N, STEP):
        q, grad, top, inverse, delta = rows_of(head, start, N, STEP, MODE)
        s = scores(k, q, MODE)  # [COLS, STEP]
        if MODE.biased:
            query, key = start + tl.arange(0, STEP), first + tl.arange(0, COLS)
            s = plus_bias(s, head, query[None, :], key[:, None], N, MODE)
        p = power(s, top, 0, MODE) * inverse[None, :]
        grad_v += dot(narrow(p, v.dtype), grad, MODE)
        grad_s = p * (dot(v, tl.trans(grad), MODE) - delta[None, :])
        grad_k += dot(narrow(grad_s, k.dtype), q, MODE)
    store(grad_k_out, grad_k * MODE.scale, first, head.qkv_stride, head.qk_width, N, COLS, MODE.width)
    store(grad_v_out, grad_v, first, head.qkv_stride, head.v_width, N, COLS, MODE.width)


@triton.jit
def _backward_queries(head, grad_q_out, first, N, ROWS: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr):
    # dq of one tile of queries.
    q, grad, top, inverse, delta = rows_of(head, first, N, ROWS, MODE)
    grad_q = tl.full((ROWS, MODE.width), 0.0, MODE.acc)
    for start in range(0, N, STEP):
        k = load(head.k, start, head.qkv_stride, head.qk_width, N, STEP, MODE.width, False)
        v = load(head.v, start, head.qkv_stride, head.v_width, N, STEP, MODE.width, False)
        s, key = scores(q, k, MODE), start + tl.arange(0, STEP)
        if MODE.biased:
            s = plus_bias(s, head, (first + tl.arange(0, ROWS))[:, None], key[None, :], N, MODE)
        s = tl.where((key < N)[None, :], s, float("-inf"))
        p = power(s, top, 1, MODE) * inverse[:, None]  # [ROWS, STEP]
        grad_s = p * (dot(grad, tl.trans(v), MODE) - delta[:, None])
        grad_q += dot(narrow(grad_s, k.dtype), k, MODE)
    store(grad_q_out, grad_q * MODE.scale, first, head.qkv_stride, head.qk_width, N, ROWS, MODE.width)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=("order",))
def _backward(qkv, heads, grad_heads, grad_qkv, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads,
              first_head, bias, order, n_biases, bias_heads, BLOCK: tl.constexpr, TAIL: tl.constexpr,
              MODE: tl.constexpr):  # fmt: skip
    # A program owns either the dk and dv of one tile of keys or the dq of one tile of queries: nothing is
    # written twice, so there are no atomics and every run adds up in the same order. The inner loops go in
    # steps of half a tile: a step of a whole one, or a shorter last step, spills registers.
    STEP: tl.constexpr = BLOCK // 2 if BLOCK > 16 else 16
    tiles = (N + BLOCK - 1) // BLOCK
    part, pair = tl.program_id(0) % (2 * tiles), tl.program_id(0) // (2 * tiles)
    head = head_of(
        qkv, heads, grad_heads, top, inverse, table, pair, n_heads, first_head, N, M, qkv_stride,
        heads_stride, bias, order, n_biases, bias_heads, MODE,
    )  # fmt: skip
    first = part // 2 * BLOCK
    if part % 2 == 0:
        if TAIL == BLOCK or first + BLOCK < N:
            _backward_keys(
                head, grad_qkv + head.k_place, grad_qkv + head.v_place, first, N, BLOCK, STEP, MODE
            )
        else:
            _backward_keys(head, grad_qkv + head.k_place, grad_qkv + head.v_place, first, N, TAIL, STEP, MODE)
    else:
        if TAIL == BLOCK or first + BLOCK < N:
            _backward_queries(head, grad_qkv + head.q_place, first, N, BLOCK, STEP, MODE)
        else:
            _backward_queries(head, grad_qkv + head.q_place, first, N, TAIL, STEP, MODE)


def block_of(dtype: torch.dtype, width: int, crowded: bool = False) -> int:
    """Tokens in a tile: what tensor cores want, less where float32 tiles would leave the registers.

    crowded: before Hopper, with a bias: then tiles of 64 dims would leave them, too.
    """
    if dtype.itemsize == 2:
        return 32 if crowded and width >= 64 else 64
    return 32 if width < 128 else 16


def _options(kernel, width: int, dtype: torch.dtype, hip: bool, biased: bool) -> dict[str, int]:
    # AMD's warps are twice as wide, and its threads have twice the registers.
    half, most = dtype.itemsize == 2, None
    many = width * dtype.itemsize > (64 if biased and kernel is _backward and not half else 128)
    options = {"num_warps": 8 if many and not hip else 4, "num_stages": 2}
    # Left to itself ptxas stops at 72 to 96 registers on some targets, and spills.
    if kernel is _forward and width * dtype.itemsize == 64:
        most = 128 if half and not biased else 168
    elif kernel is _backward and (width == 64 or not half):
        most = 255 if width in (32, 64) or (biased and width == 128) else 128
    elif kernel is _backward and biased and width < 64:
        most = 255
    return options if hip or most is None else options | {"maxnreg": most}


def _shape(tokens: int, mode: Mode, dtype: torch.dtype, crowded: bool) -> dict[str, object]:
    """The compile-time arguments for so many tokens."""
    block = block_of(dtype, mode.width, crowded)
    # Of a small tile's bias each of the many threads that 128 dims take would read a single number.
    small = (tokens - 1) % block < SMALL and not (mode.biased and mode.width == 128)
    return {"BLOCK": block, "TAIL": SMALL if small else block, "MODE": mode}


def attention_core(
    qkv: Tensor, table: Tensor, counts: list[int], tokens: int, scale: float, heads: Tensor, top: Tensor,
    inverse: Tensor, bias: Tensor | None = None, order: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes `heads` [M, V] and the softmax statistics `top`, `inverse` [h, M] from the packed `qkv` [M, S].

    table: int32 [h, 6], per kept head the columns of its q, k, v in `qkv` and of its v in `heads`, and its
    q/k and v widths, all multiples of 8; counts: how many of its rows, in order, are as wide as each of
    `WIDTHS`. bias, order: see `Bias`; `top` is then with scale and bias.
    """
    _launch(_forward, (qkv, heads, top, inverse, table), counts, tokens, scale, 1, bias, order)


def attention_core_backward(
    qkv: Tensor, heads: Tensor, grad_heads: Tensor, top: Tensor, inverse: Tensor, table: Tensor,
    counts: list[int], tokens: int, scale: float, grad_qkv: Tensor, bias: Tensor | None = None,
    order: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes `grad_qkv` from `grad_heads` and what `attention_core` wrote."""
    tensors = qkv, heads, grad_heads, grad_qkv, top, inverse, table
    _launch(_backward, tensors, counts, tokens, scale, 2, bias, order)


def _launch(kernel, tensors, counts, tokens, scale, programs_per_tile, bias, order) -> None:
    qkv, heads, M = tensors[0], tensors[1], tensors[0].shape[0]
    backward, added = kernel is _backward, bias_of(bias, order)
    crowded = bias is not None and not is_hopper(qkv.device)
    first = 0
    for width, count in zip(WIDTHS, counts, strict=True):
        numbers = (tokens, M, qkv.stride(0), heads.stride(0), count, first, *added)
        programs, mode = count * (M // tokens), mode_of(width, scale, qkv.dtype, bias is not None)
        if programs and whole.fits(tokens, width, qkv, backward, bias is not None):
            (whole.backward if backward else whole.forward)(tensors, numbers, programs, mode)
        elif programs:
            tiles = triton.cdiv(tokens, block_of(qkv.dtype, width, crowded))
            kernel[(programs * tiles * programs_per_tile,)](
                *tensors,
                *numbers,
                **_shape(tokens, mode, qkv.dtype, crowded),
                **_options(kernel, width, qkv.dtype, HIP, bias is not None),
            )
        first += count


def cases() -> list[Case]:
    """Everything the two can launch, at the scale of 64 dims."""
    found = []
    every = itertools.product((_forward, _backward), DTYPES, WIDTHS, (False, True))
    for kernel, dtype, width, biased in every:
        types = {"top": wide(dtype), "inverse": wide(dtype), "table": "i32"}
        types |= dict.fromkeys(("qkv", "heads", "grad_heads", "grad_qkv", "bias"), ELEMENT[dtype])
        signature = signature_of(kernel.arg_names[:-3], types, biased)
        mode, half = mode_of(width, 0.125, dtype, biased), dtype.itemsize == 2
        options = {hip: _options(kernel, width, dtype, hip, biased) for hip in (False, True)}
        shapes = {}
        for tokens, crowded in itertools.product((1, block_of(dtype, width)), (False, biased)):
            shape = _shape(tokens, mode, dtype, crowded)
            shapes.setdefault((shape["BLOCK"], shape["TAIL"]), (shape, set()))[1].add(crowded)
        for (_, tail), (shape, crowds) in shapes.items():
            label = f"{ELEMENT[dtype]} width {width} tail {tail}{' bias' * biased}"
            targets = () if len(crowds) > 1 or not biased else CROWDED if True in crowds else HOPPER
            found.append(Case(kernel, label, signature, shape | missing(biased), options, half, targets))
    return found

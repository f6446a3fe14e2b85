"""Attention of one head of one image in one program, for up to 256 tokens of 16-bit numbers.

The formulas are those of `attention_core`. A query sees its whole row of scores at once, so the softmax needs
no second look; everything is read once. The backward pass holds all keys, with their dk and dv, and goes
through the queries: it multiplies five tiles where two passes, for dk and dv and for dq, multiply seven.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_head import NUMBERS, by_of, head_of, load, power, scores, store
from .launch import DTYPES, ELEMENT, INTERPRETED, Case, dot, narrow, wide

# Tiles of keys in the forward pass for so many tokens; what is behind the first tile is masked.
TILES = {64: (64, 0, 0), 128: (128, 0, 0), 208: (128, 64, 16), 256: (128, 128, 0)}
ROWS = tl.constexpr(64)  # queries in a tile of the forward pass


@triton.jit
def _keys(head, first, N, COLS: tl.constexpr, MODE: tl.constexpr):
    k = load(head[1], first, head[7], head[9], N, COLS, MODE[2], False)
    return k, load(head[2], first, head[7], head[10], N, COLS, MODE[2], False)


@triton.jit
def _row(q, k, first, N, COLS: tl.constexpr, WHOLE: tl.constexpr, MODE: tl.constexpr):
    s = scores(q, k, MODE)  # [ROWS, COLS]
    if not WHOLE:
        s = tl.where((first + tl.arange(0, COLS) < N)[None, :], s, float("-inf"))
    return s


@triton.jit
def _attend(head, keys, first, N, ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
            MODE: tl.constexpr):  # fmt: skip
    # The output of one tile of queries; keys = (k, v) of each tile of keys.
    q = load(head[0], first, head[7], head[9], N, ROWS, MODE[2], False)
    s0 = _row(q, keys[0][0], 0, N, KEYS[0], WHOLE, MODE)
    top = tl.max(s0, 1)
    if KEYS[1] > 0:
        s1 = _row(q, keys[1][0], KEYS[0], N, KEYS[1], False, MODE)
        top = tl.maximum(top, tl.max(s1, 1))
    if KEYS[2] > 0:
        s2 = _row(q, keys[2][0], KEYS[0] + KEYS[1], N, KEYS[2], False, MODE)
        top = tl.maximum(top, tl.max(s2, 1))
    p = power(s0, top, 1, MODE)
    total = tl.sum(p, 1)
    acc = dot(narrow(p, q.dtype), keys[0][1], MODE)
    if KEYS[1] > 0:
        p = power(s1, top, 1, MODE)
        total += tl.sum(p, 1)
        acc += dot(narrow(p, q.dtype), keys[1][1], MODE)
    if KEYS[2] > 0:
        p = power(s2, top, 1, MODE)
        total += tl.sum(p, 1)
        acc += dot(narrow(p, q.dtype), keys[2][1], MODE)
    inverse = 1.0 / total
    store(head[3], acc * inverse[:, None], first, head[8], head[10], N, ROWS, MODE[2])
    row = first + tl.arange(0, ROWS)
    tl.store(head[5] + row, top, mask=row < N)
    tl.store(head[6] + row, inverse, mask=row < N)


@triton.jit(do_not_specialize=NUMBERS)
def _forward(qkv, heads, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads, first_head,
             KEYS: tl.constexpr, WHOLE: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    head, _, _, _ = head_of(
        qkv, heads, heads, top, inverse, table, tl.program_id(0), n_heads, first_head, N, M, qkv_stride,
        heads_stride,
    )  # fmt: skip
    keys0 = _keys(head, 0, N, KEYS[0], MODE)
    keys1 = keys0
    keys2 = keys0
    if KEYS[1] > 0:
        keys1 = _keys(head, KEYS[0], N, KEYS[1], MODE)
    if KEYS[2] > 0:
        keys2 = _keys(head, KEYS[0] + KEYS[1], N, KEYS[2], MODE)
    keys = (keys0, keys1, keys2)
    for first in range(0, N, ROWS):
        _attend(head, keys, first, N, ROWS, KEYS, WHOLE, MODE)


@triton.jit(do_not_specialize=NUMBERS)
def _backward(qkv, heads, grad_heads, grad_qkv, top, inverse, table, N, M, qkv_stride, heads_stride, n_heads,
              first_head, KEYS: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    # All keys at once, STEP queries at a time; tiles of P and dS are [KEYS, STEP]. dq is made transposed,
    # [E, STEP]: a product of 64 rows, as tensor cores want it.
    head, q_place, k_place, v_place = head_of(
        qkv, heads, grad_heads, top, inverse, table, tl.program_id(0), n_heads, first_head, N, M, qkv_stride,
        heads_stride,
    )  # fmt: skip
    k, v = _keys(head, 0, N, KEYS, MODE)
    grad_k, grad_v = tl.full((KEYS, MODE[2]), 0.0, MODE[0]), tl.full((KEYS, MODE[2]), 0.0, MODE[0])
    for first in range(0, N, STEP):
        q = load(head[0], first, head[7], head[9], N, STEP, MODE[2], False)
        o = load(head[3], first, head[8], head[10], N, STEP, MODE[2], False)
        grad = load(head[4], first, head[8], head[10], N, STEP, MODE[2], False)
        delta = tl.sum(o.to(MODE[0]) * grad.to(MODE[0]), 1)
        row = first + tl.arange(0, STEP)
        # Behind the last token P = 0.
        high = tl.load(head[5] + row, mask=row < N, other=float("inf"))
        shift = high * by_of(MODE) - tl.log2(tl.load(head[6] + row, mask=row < N, other=1.0))
        # P is at most 1, but for what stands behind the last key, whose zeros must not meet an infinity.
        p = tl.exp2(tl.minimum(tl.fma(scores(k, q, MODE), by_of(MODE), -shift[None, :]), 0.0))
        grad_v += dot(narrow(p, v.dtype), grad, MODE)
        grad_s = p * (dot(v, tl.trans(grad), MODE) - delta[None, :])
        grad_s = narrow(grad_s, k.dtype)
        grad_k += dot(grad_s, q, MODE)
        grad_q = tl.trans(dot(tl.trans(k), grad_s, MODE)) * MODE[3]
        store(grad_qkv + q_place, grad_q, first, head[7], head[9], N, STEP, MODE[2])
    store(grad_qkv + k_place, grad_k * MODE[3], 0, head[7], head[9], N, KEYS, MODE[2])
    store(grad_qkv + v_place, grad_v, 0, head[7], head[10], N, KEYS, MODE[2])


def fits(tokens: int, width: int, tensor: Tensor, backward: bool) -> bool:
    """Whether these kernels serve so many tokens of heads so wide, on the tensor's device.

    The backward pass and the longest rows need the tensor cores of Hopper or later, which read what they
    multiply from shared memory: elsewhere they would spill registers.
    """
    if tokens > max(TILES) or width > 64 or tensor.dtype.itemsize != 2:
        return False
    if INTERPRETED.value or (tokens <= 208 and not backward):
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def forward(tensors: tuple[Tensor, ...], numbers: tuple[int, ...], programs: int, mode: tuple) -> None:
    """One launch of `programs` (image, head) pairs; arguments as `attention_core` lays them out."""
    _forward[(programs,)](*tensors, *numbers, **_forward_shape(numbers[0], mode), num_warps=4, num_stages=2)


def backward(tensors: tuple[Tensor, ...], numbers: tuple[int, ...], programs: int, mode: tuple) -> None:
    """The same of the backward pass."""
    shape, options = _backward_shape(numbers[0], mode)
    _backward[(programs,)](*tensors, *numbers, **shape, **options)


def _forward_shape(tokens: int, mode: tuple) -> dict[str, object]:
    most = next(n for n in TILES if n >= tokens)
    return {"KEYS": TILES[most], "WHOLE": most > 128, "MODE": mode}


def _backward_shape(tokens: int, mode: tuple) -> tuple[dict[str, object], dict[str, int]]:
    keys = next(n for n in (64, 128, 256) if n >= tokens)
    # Beside 256 keys there are registers for 16 queries; with 32, Triton 3.6 to 3.8 spill.
    shape = {"KEYS": keys, "STEP": 16 if keys == 256 else 64, "MODE": mode}
    return shape, {"num_warps": 4 if keys == 64 else 8, "num_stages": 2}


def cases() -> list[Case]:
    """Everything the two can launch, at the scale of 64 dims."""
    found = []
    for dtype, width, tokens in itertools.product(DTYPES[:2], (16, 32, 64), TILES):
        mode = (wide(dtype), "ieee", width, 0.125)
        types = {"top": wide(dtype), "inverse": wide(dtype), "table": "i32"}
        types |= dict.fromkeys(("qkv", "heads", "grad_heads", "grad_qkv"), ELEMENT[dtype])
        hopper = ("sm_90", "sm_100")
        options, where = {"num_warps": 4, "num_stages": 2}, hopper if tokens > 208 else ()
        jobs = [(_forward, tokens, _forward_shape(tokens, mode), options, where)]
        if tokens != 208:
            jobs.append((_backward, tokens, *_backward_shape(tokens, mode), hopper))
        for kernel, most, shape, options, targets in jobs:
            names = [name for name in kernel.arg_names if name not in shape]
            signature = {name: f"*{types[name]}" if name in types else "i32" for name in names}
            label = f"{ELEMENT[dtype]} width {width} tokens {most}"
            both = {False: options, True: options}
            found.append(Case(kernel, label, signature, shape, both, True, targets))
    return found

"""The gradient of a bias of attention scores on Triton: of every tile the sum over the images that share it.

    dbias[p] = sum over images i = p, p + P, .. of dS,   dS as in `attention_core`

A program owns one tile of one head's bias and goes through these images: there are no atomics, and every run
adds up in the same order. It runs only where the bias is trained, and multiplies for S and dP once more.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import WIDTHS
from .attention_core import CROWDED, HOPPER, block_of, rows_of
from .attention_head import NUMBERS, bias_of, dot, head_of, is_hopper, load, mode_of, plus_bias, power, scores
from .launch import DTYPES, ELEMENT, Case, narrow, wide


@triton.jit(do_not_specialize=(*NUMBERS, "all_heads"), do_not_specialize_on_alignment=("order",))
def _bias_gradient(qkv, heads, grad_heads, top, inverse, table, grad_bias, N, M, qkv_stride, heads_stride,
                   n_heads, first_head, bias, order, n_biases, bias_heads, all_heads, BLOCK: tl.constexpr,
                   MODE: tl.constexpr):  # fmt: skip
    tiles = (N + BLOCK - 1) // BLOCK
    tile, pair = tl.program_id(0) % (tiles * tiles), tl.program_id(0) // (tiles * tiles)
    first, start = tile // tiles * BLOCK, tile % tiles * BLOCK
    row, key = first + tl.arange(0, BLOCK), start + tl.arange(0, BLOCK)
    total = tl.full((BLOCK, BLOCK), 0.0, MODE.acc)
    for image in range(pair // n_heads, M // N, n_biases):
        head = head_of(
            qkv, heads, grad_heads, top, inverse, table, image * n_heads + pair % n_heads, n_heads,
            first_head, N, M, qkv_stride, heads_stride, bias, order, n_biases, bias_heads, MODE,
        )  # fmt: skip
        q, grad, high, factor, delta = rows_of(head, first, N, BLOCK, MODE)
        k = load(head.k, start, head.qkv_stride, head.qk_width, N, BLOCK, MODE.width, False)
        v = load(head.v, start, head.qkv_stride, head.v_width, N, BLOCK, MODE.width, False)
        s = plus_bias(scores(q, k, MODE), head, row[:, None], key[None, :], N, MODE)
        p = power(s, high, 1, MODE) * factor[:, None]
        total += p * (dot(grad, tl.trans(v), MODE) - delta[:, None])
    place = (pair // n_heads).to(tl.int64) * all_heads + tl.load(order + first_head + pair % n_heads)
    out = grad_bias + (place * N + row[:, None]) * N + key[None, :]
    inside = (row < N)[:, None] & (key < N)[None, :]
    tl.store(out, narrow(total, grad_bias.dtype.element_ty), mask=inside)


def _options(width: int, dtype: torch.dtype) -> dict[str, int]:
    return {"num_warps": 8 if width * dtype.itemsize > 128 else 4, "num_stages": 2}


def bias_gradient(
    qkv: Tensor, heads: Tensor, grad_heads: Tensor, top: Tensor, inverse: Tensor, table: Tensor,
    counts: list[int], tokens: int, scale: float, bias: Tensor, order: Tensor, grad_bias: Tensor,
) -> None:  # fmt: skip
    """Writes `grad_bias` [P, h, N, N], of any dtype, from what `attention_core_backward` takes."""
    M, P = qkv.shape[0], bias.shape[0]
    first = 0
    for width, count in zip(WIDTHS, counts, strict=True):
        if count and M:
            block = block_of(qkv.dtype, width, not is_hopper(qkv.device))
            _bias_gradient[(P * count * triton.cdiv(tokens, block) ** 2,)](
                qkv, heads, grad_heads, top, inverse, table, grad_bias, tokens, M, qkv.stride(0),
                heads.stride(0), count, first, *bias_of(bias, order), grad_bias.shape[1],
                BLOCK=block, MODE=mode_of(width, scale, qkv.dtype, True), **_options(width, qkv.dtype),
            )  # fmt: skip
        first += count


def cases() -> list[Case]:
    """Everything `bias_gradient` can launch for a bias of the dtype of x, or in float32, at the scale of 64
    dims.
    """
    found = []
    for dtype, width in itertools.product(DTYPES, WIDTHS):
        for of_bias in dict.fromkeys((dtype, torch.float32)):
            types = {"top": wide(dtype), "inverse": wide(dtype), "table": "i32", "order": "i32"}
            types |= dict.fromkeys(("qkv", "heads", "grad_heads", "bias"), ELEMENT[dtype])
            types |= {"grad_bias": ELEMENT[of_bias]}
            names = _bias_gradient.arg_names[:-2]
            signature = {name: f"*{types[name]}" if name in types else "i32" for name in names}
            options = dict.fromkeys((False, True), _options(width, dtype))
            blocks = {block_of(dtype, width, crowded): crowded for crowded in (False, True)}
            for block, crowded in blocks.items():
                shape = {"BLOCK": block, "MODE": mode_of(width, 0.125, dtype, True)}
                label = f"{ELEMENT[dtype]} width {width} tile {block} to {ELEMENT[of_bias]}"
                where = () if len(blocks) == 1 else CROWDED if crowded else HOPPER
                case = Case(_bias_gradient, label, signature, shape, options, dtype.itemsize == 2, where)
                found.append(case)
    return found

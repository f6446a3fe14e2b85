"""Products over kept rows whose indices and count lie on the device: one captured graph, any structure.

    onto    out[m, j] = sum_d x[m, d] W[rows[j], d] + bias[rows[j]]          j < count, and what follows there
    back    out[m, d] = sum_{j < count} a[m, j] W[rows[j], d] + bias[d]
    grads   partial[s, j, d] = sum_{m in slice s} a[m, j] b[m, d]            then summed over s in order

M tokens, D width, R dense rows, E envelope: columns that hold the kept rows of any structure. Grids depend on
M, D, R and E alone; a program whose columns are all behind `count` leaves at once. Columns behind `count` are
neither written nor read. rows[j] = -1 stands for a row of zeros. D, E and count are multiples of 8.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..mlp import ACTIVATIONS
from .activation import act
from .launch import DTYPES, ELEMENT, Case, dot, dot_precision, eights, narrow, wide

HIP = torch.version.hip is not None
# Nothing about a size is compiled in, so the sizes of all layers share their kernels.
SIZES = ("M", "D", "E", "R", "tiles")
PROGRAMS = 264  # about two for each multiprocessor: into how many slices the tokens are cut
KINDS = ("bare", "plain", "act", "gated", "act backward", "gated backward")


@triton.jit
def _transpose(weight, whole, out, D, R, BLOCK: tl.constexpr):
    # out [R, D] = weight [D, R]^T in the rows that are kept.
    D = eights(D)
    across = (R + BLOCK - 1) // BLOCK
    r = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(whole + r, mask=r < R, other=-1) >= 0
    inside = (d < D)[:, None] & kept[None, :]  # [BLOCK d, BLOCK r]
    value = tl.load(weight + d.to(tl.int64)[:, None] * R + r[None, :], mask=inside, other=0.0)
    tl.store(out + r.to(tl.int64)[:, None] * D + d[None, :], tl.trans(value), mask=tl.trans(inside))


@triton.jit
def _product(x, weight, rows, count, first, m, M, D, BLOCK: tl.constexpr, MODE: tl.constexpr):
    # x[m] times the kept rows first.. of weight, [BLOCK m, BLOCK j].
    j, d = first + tl.arange(0, BLOCK[1]), tl.arange(0, BLOCK[2])
    row = tl.load(rows + j, mask=j < count, other=-1).to(tl.int64)
    acc = tl.full((BLOCK[0], BLOCK[1]), 0.0, MODE[0])
    for start in range(0, D, BLOCK[2]):
        inside = start + d < D
        a = tl.load(
            x + m[:, None] * D + (start + d)[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0
        )
        at = weight + row[None, :] * D + (start + d)[:, None]  # [BLOCK d, BLOCK j]
        b = tl.load(at, mask=inside[:, None] & (row >= 0)[None, :], other=0.0)
        acc += dot(a, b, MODE)
    return acc


@triton.jit
def _biased(acc, bias, rows, count, first, BLOCK: tl.constexpr):
    j = first + tl.arange(0, BLOCK[1])
    row = tl.load(rows + j, mask=j < count, other=-1)
    return acc + tl.load(bias + row, mask=row >= 0, other=0.0).to(acc.dtype)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _onto(x, weight, bias, gate, gate_bias, rows, count, u, g, a, grad_u, grad_g, M, D, E,
          KIND: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    D, E = eights(D), eights(E)
    across = (E + BLOCK[1] - 1) // BLOCK[1]
    first = tl.program_id(0) % across * BLOCK[1]
    count = eights(tl.load(count))
    if first >= count:
        return
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK[0] + tl.arange(0, BLOCK[0])
    j = first + tl.arange(0, BLOCK[1])
    at, inside = m[:, None] * E + j[None, :], (m < M)[:, None] & (j < count)[None, :]  # [BLOCK m, BLOCK j]
    element = u.dtype.element_ty
    acc = _product(x, weight, rows, count, first, m, M, D, BLOCK, MODE)
    if KIND == "bare":
        tl.store(u + at, narrow(acc, element), mask=inside)
    if KIND == "plain" or KIND == "act" or KIND == "gated":
        acc = _biased(acc, bias, rows, count, first, BLOCK)
        # What the backward pass will read: the activation is that of the rounded number.
        acc = narrow(acc, element)
        tl.store(u + at, acc, mask=inside)
    if KIND == "act":
        tl.store(a + at, narrow(act(acc.to(MODE[0]), ACT)[0], element), mask=inside)
    if KIND == "gated":
        opened = _product(x, gate, rows, count, first, m, M, D, BLOCK, MODE)
        opened = narrow(_biased(opened, gate_bias, rows, count, first, BLOCK), element)
        tl.store(g + at, opened, mask=inside)
        value = acc.to(MODE[0]) * act(opened.to(MODE[0]), ACT)[0]
        tl.store(a + at, narrow(value, element), mask=inside)
    if KIND == "act backward":
        _, slope = act(tl.load(u + at, mask=inside, other=0.0).to(MODE[0]), ACT)
        tl.store(grad_u + at, narrow(acc * slope, element), mask=inside)
    if KIND == "gated backward":
        opened, slope = act(tl.load(g + at, mask=inside, other=0.0).to(MODE[0]), ACT)
        tl.store(grad_u + at, narrow(acc * opened, element), mask=inside)
        value = tl.load(u + at, mask=inside, other=0.0).to(MODE[0])
        tl.store(grad_g + at, narrow(acc * value * slope, element), mask=inside)


@triton.jit
def _sum_of_rows(acc, a, weight, rows, count, d, m, M, D, E, BLOCK: tl.constexpr, MODE: tl.constexpr):
    # acc + a[m, :count] times the kept rows of weight, [BLOCK m, BLOCK d].
    j = tl.arange(0, BLOCK[2])
    for start in range(0, count, BLOCK[2]):
        inside = start + j < count
        row = tl.load(rows + start + j, mask=inside, other=-1).to(tl.int64)
        left = (m < M)[:, None] & inside[None, :]
        value = tl.load(a + m[:, None] * E + (start + j)[None, :], mask=left, other=0.0)
        at = weight + row[:, None] * D + d[None, :]  # [BLOCK j, BLOCK d]
        kept = tl.load(at, mask=(row >= 0)[:, None] & (d < D)[None, :], other=0.0)
        acc += dot(value, kept, MODE)
    return acc


@triton.jit(do_not_specialize=SIZES)
def _back(a, weight, other_a, other_weight, bias, rows, count, out, M, D, E,
          PAIRS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    D, E = eights(D), eights(E)
    across = (D + BLOCK[1] - 1) // BLOCK[1]
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK[0] + tl.arange(0, BLOCK[0])
    d = tl.program_id(0) % across * BLOCK[1] + tl.arange(0, BLOCK[1])
    count = eights(tl.load(count))
    acc = tl.full((BLOCK[0], BLOCK[1]), 0.0, MODE[0])
    acc = _sum_of_rows(acc, a, weight, rows, count, d, m, M, D, E, BLOCK, MODE)
    if PAIRS == 2:
        acc = _sum_of_rows(acc, other_a, other_weight, rows, count, d, m, M, D, E, BLOCK, MODE)
    if BIAS:
        acc += tl.load(bias + d, mask=d < D, other=0.0).to(MODE[0])[None, :]
    inside = (m < M)[:, None] & (d < D)[None, :]
    tl.store(out + m[:, None] * D + d[None, :], narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*SIZES, "slice"))
def _grads(a, b, count, partial, bias_partial, M, D, E, slice,
           BLOCK: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    # Behind the tiles of D there is one more program, which adds up a[m, j] for the bias.
    D, E = eights(D), eights(E)
    across, tiles = (E + BLOCK[0] - 1) // BLOCK[0], (D + BLOCK[1] - 1) // BLOCK[1] + 1
    tile, part = tl.program_id(0) // across % tiles, tl.program_id(0) // across // tiles
    j = tl.program_id(0) % across * BLOCK[0] + tl.arange(0, BLOCK[0])
    count = eights(tl.load(count))
    if tl.program_id(0) % across * BLOCK[0] >= count:
        return
    d, step = tile * BLOCK[1] + tl.arange(0, BLOCK[1]), tl.arange(0, BLOCK[2])
    first, last = part.to(tl.int64) * slice, tl.minimum(M, (part + 1).to(tl.int64) * slice)
    line = part.to(tl.int64) * E + j
    if tile + 1 < tiles:
        acc = tl.full((BLOCK[0], BLOCK[1]), 0.0, MODE[0])
        for start in range(first, last, BLOCK[2]):
            m = start + step
            at = a + m[:, None] * E + j[None, :]  # [BLOCK m, BLOCK j]
            left = tl.load(at, mask=(m < last)[:, None] & (j < count)[None, :], other=0.0)
            at = b + m[:, None] * D + d[None, :]  # [BLOCK m, BLOCK d]
            right = tl.load(at, mask=(m < last)[:, None] & (d < D)[None, :], other=0.0)
            acc += dot(tl.trans(left), right, MODE)
        inside = (j < count)[:, None] & (d < D)[None, :]
        tl.store(partial + line[:, None] * D + d[None, :], acc, mask=inside)
    else:
        total = tl.full((BLOCK[2], BLOCK[0]), 0.0, MODE[0])
        for start in range(first, last, BLOCK[2]):
            m = start + step
            at = a + m[:, None] * E + j[None, :]
            total += tl.load(at, mask=(m < last)[:, None] & (j < count)[None, :], other=0.0).to(MODE[0])
        tl.store(bias_partial + line, tl.sum(total, 0), mask=j < count)


@triton.jit(do_not_specialize=(*SIZES, "slices"))
def _spread(partial, bias_partial, whole, out, bias_out, D, E, R, slices,
            COLUMNS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # out[r, d] (COLUMNS: out[d, r]) = sum over the slices of the partial of row r, zero where it is removed.
    D, E = eights(D), eights(E)
    across = (R + BLOCK - 1) // BLOCK
    r = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(whole + r, mask=r < R, other=-1).to(tl.int64)
    kept = (place >= 0)[:, None] & (d < D)[None, :]  # [BLOCK r, BLOCK d]
    total = tl.full((BLOCK, BLOCK), 0.0, partial.dtype.element_ty)
    for part in range(slices):
        line = place + part * E
        total += tl.load(partial + line[:, None] * D + d[None, :], mask=kept, other=0.0)
    value, inside = narrow(total, out.dtype.element_ty), (r < R)[:, None] & (d < D)[None, :]
    if COLUMNS:
        at = out + d.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(at, tl.trans(value), mask=tl.trans(inside))
    else:
        tl.store(out + r.to(tl.int64)[:, None] * D + d[None, :], value, mask=inside)
    if BIAS:
        if tl.program_id(0) < across:
            sums = tl.full((BLOCK,), 0.0, partial.dtype.element_ty)
            for part in range(slices):
                sums += tl.load(bias_partial + place + part * E, mask=place >= 0, other=0.0)
            tl.store(bias_out + r, narrow(sums, bias_out.dtype.element_ty), mask=r < R)


def _blocks(kind: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tile heights, widths and the step of the inner loop."""
    if dtype.itemsize > 2:
        return 64, 64, 16
    return (128, 128, 64) if kind in ("bare", "plain", "act") else (128, 64, 64)


def _options(dtype: torch.dtype, hip: bool) -> dict[str, int]:
    return {"num_warps": 8, "num_stages": 2 if hip else 3}


def _shape(kind: str, dtype: torch.dtype) -> dict[str, object]:
    return {"BLOCK": _blocks(kind, dtype), "MODE": (wide(dtype), dot_precision(dtype))}


def transpose(weight: Tensor, whole: Tensor, out: Tensor) -> None:
    """out [R, D] = `weight` [D, R] transposed in the rows where `whole` [R] is not -1, and only there."""
    D, R = weight.shape
    if out.numel():
        _transpose[(triton.cdiv(R, 64) * triton.cdiv(D, 64),)](weight, whole, out, D, R, BLOCK=64)


def onto(
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    count: Tensor,
    u: Tensor,
    *,
    activation: str = "relu",
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    g: Tensor | None = None,
    a: Tensor | None = None,
    grad_u: Tensor | None = None,
    grad_g: Tensor | None = None,
) -> None:
    """x [M, D] times kept rows of `weight` [R, D], by kind:

    plain: u, or without a bias bare. act: u and a = act(u). gated: u, g = the same of `gate`, a = act(g) u.
    act backward: the product is da, grad_u = da act'(u). gated backward: grad_u and grad_g.
    All results are [M, E]; rows [E] and count [1] int32.
    """
    (M, D), E = x.shape, rows.shape[0]
    if kind in ("act", "gated"):
        bias, gate_bias = (weight.new_zeros(len(weight)) if b is None else b for b in (bias, gate_bias))
    kind = "bare" if kind == "plain" and bias is None else kind
    block = _blocks(kind, x.dtype)
    if M and E:
        # What a kind does not have is neither read nor written.
        given = (bias, gate, gate_bias, rows, count, u, g, a, grad_u, grad_g)
        _onto[(triton.cdiv(M, block[0]) * triton.cdiv(E, block[1]),)](
            x, weight, *(u if t is None else t for t in given), M, D, E,
            KIND=kind, ACT=activation, **_shape(kind, x.dtype), **_options(x.dtype, HIP),
        )  # fmt: skip


def back(
    pairs: list[tuple[Tensor, Tensor]], bias: Tensor | None, rows: Tensor, count: Tensor, out: Tensor
) -> None:
    """out [M, D] = sum over the pairs of a [M, :count] times the kept rows of W [R, D], plus bias [D]."""
    M, D = out.shape
    block = _blocks("plain", out.dtype)
    if M and D:
        flat = [t for pair in (pairs * 2)[:2] for t in pair]
        _back[(triton.cdiv(M, block[0]) * triton.cdiv(D, block[1]),)](
            *flat, out if bias is None else bias, rows, count, out, M, D, rows.shape[0],
            PAIRS=len(pairs), BIAS=bias is not None, **_shape("plain", out.dtype), **_options(out.dtype, HIP),
        )  # fmt: skip


def grads(
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    count: Tensor,
    whole: Tensor,
    out: Tensor | None,
    bias: Tensor | None = None,
    columns: bool = False,
) -> None:
    """out [R, D] = a[:, :count]^T b spread over the kept rows, zeros elsewhere; bias [R] the sums of a.

    a [M, E], b [M, D]; whole [R] int32: the column of a that is row r, or -1. columns: out is [D, R]. The
    order of additions depends on shapes alone. Without `out` there must be no bias either.
    """
    if out is None and bias is None:
        return
    (M, D), E, R = b.shape, rows.shape[0], whole.shape[0]
    # A bias alone is rare: its matrix is computed along.
    out = b.new_empty((D, R) if columns else (R, D)) if out is None else out
    block = _blocks("plain", b.dtype)
    tiles = triton.cdiv(E, block[0]) * (triton.cdiv(D, block[1]) + 1)
    # Slices of whole steps, long enough to be worth a program.
    steps = triton.cdiv(M, block[2])
    slices = max(1, min(PROGRAMS // max(1, tiles), 16, steps // 8))
    size = triton.cdiv(steps, slices) * block[2]
    statistics = torch.float64 if b.dtype == torch.float64 else torch.float32
    partial = b.new_empty(slices, E, D, dtype=statistics)
    bias_partial = b.new_empty(slices, E, dtype=statistics)
    if tiles and D:
        _grads[(tiles * slices,)](
            a, b, count, partial, bias_partial, M, D, E, size,
            **_shape("plain", b.dtype), **_options(b.dtype, HIP),
        )  # fmt: skip
    if out.numel():
        _spread[(triton.cdiv(R, 32) * triton.cdiv(D, 32),)](
            partial, bias_partial, whole, out, out if bias is None else bias, D, E, R, slices,
            COLUMNS=columns, BIAS=bias is not None, BLOCK=32,
        )  # fmt: skip


def cases() -> list[Case]:
    """Everything the launchers can choose."""
    found = []
    for dtype in DTYPES:
        element = ELEMENT[dtype]
        options = {hip: _options(dtype, hip) for hip in (False, True)}

        def case(kernel, label, cores, element=element, dtype=dtype, options=options, **constants):
            types = dict.fromkeys(("rows", "count", "whole"), "i32")
            types |= dict.fromkeys(("partial", "bias_partial"), wide(dtype))
            sizes = ("M", "D", "E", "R", "slice", "slices")
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {n: "i32" if n in sizes else f"*{types.get(n, element)}" for n in names}
            label = f"{element} {label}".strip()
            half = cores and dtype.itemsize == 2
            # A bias is read by the same indices as the rows.
            chosen = options if cores else None
            return Case(kernel, label, signature, constants, chosen, half, scattered=kernel is _onto)

        for kind in KINDS:
            for activation in ("relu",) if kind in ("bare", "plain") else ACTIVATIONS:
                label = kind if kind in ("bare", "plain") else f"{kind} {activation}"
                found.append(case(_onto, label, True, KIND=kind, ACT=activation, **_shape(kind, dtype)))
        for pairs, bias in itertools.product((1, 2), (False, True)):
            label = f"{pairs} {'bias' if bias else 'plain'}"
            found.append(case(_back, label, True, PAIRS=pairs, BIAS=bias, **_shape("plain", dtype)))
        found.append(case(_grads, "", True, **_shape("plain", dtype)))
        found.append(case(_transpose, "", False, BLOCK=64))
        for columns, bias in ((False, True), (False, False), (True, False)):
            label = ("columns" if columns else "rows") + (" bias" if bias else "")
            found.append(case(_spread, label, False, COLUMNS=columns, BIAS=bias, BLOCK=32))
    return found

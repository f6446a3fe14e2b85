"""What is kept, as index tensors that ops read on the device.

H heads, K head dim, A = H*K, F hidden; h kept heads. A record is built once, on the host, when a structure
is set; all its fields are views of one buffer, so that a changed structure costs one small copy to the device
and no op ever waits to read an index back.
"""

import functools
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Self

import torch
from torch import Tensor

# Packed rows and columns are padded with zeros to this many: 16 bytes of a 2-byte type, so that every vendor
# GEMM is aligned and every head starts at a vector load.
ALIGN = 8
WIDTHS = (16, 32, 64, 128)  # the heads of a launch are padded to one of these
# A length of 0 or 1 is a constant to torch.compile, so the marks are longer than what they count.
_MARKS_MORE = 2


def align(n: int) -> int:
    """`n` rounded up to a multiple of `ALIGN`."""
    return -(-n // ALIGN) * ALIGN


class KeptHeads(NamedTuple):
    """The kept q/k and v dims of the kept heads; made by `kept_heads`.

    flat: the one buffer, int32. qk, v (int64): kept positions in 0..A, head by head, ascending; qk_offsets,
    v_offsets (int64) [h + 1] cut them by head. The rest is int32 and lays out the packed weights: all kept
    heads' q rows, then k, then v, each head's dims padded to a multiple of 8.
    rows [S]: row of qkv_weight for each packed row; columns [V]: column of proj_weight for each packed
    column; -1 is padding. whole_rows [3, H, K], whole_columns [H, K]: the inverse of both, -1 is removed.
    table [h, 6]: per head its first q, k and v columns in packed qkv [M, S], its first column in packed heads
    [M, V], its padded q/k and v widths, sorted by the smallest of `WIDTHS` that holds both. order [h]:
    which of the kept heads each of its rows is. marks16 .. marks128: two longer than the number of heads of
    that width, so that a traced op knows its launches without reading the device.
    """

    flat: Tensor
    qk: Tensor
    qk_offsets: Tensor
    v: Tensor
    v_offsets: Tensor
    rows: Tensor
    columns: Tensor
    whole_rows: Tensor
    whole_columns: Tensor
    table: Tensor
    order: Tensor
    marks16: Tensor
    marks32: Tensor
    marks64: Tensor
    marks128: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same record on `device`, by one copy."""
        return _moved(self, device)


class KeptNeurons(NamedTuple):
    """The kept hidden neurons; made by `kept_neurons`.

    flat: the one buffer, int32. neurons [F'] (int64): kept positions in 0..F, ascending. rows (int32): the
    same, padded with -1 to a multiple of 8; whole (int32) [F]: packed row of each neuron, -1 is removed.
    """

    flat: Tensor
    neurons: Tensor
    rows: Tensor
    whole: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same record on `device`, by one copy."""
        return _moved(self, device)


def kept_heads(qk_mask: Tensor, v_mask: Tensor, device: torch.device | str | None = None) -> KeptHeads:
    """The record of two bool masks [H, K] (True = kept), on `device` (the masks' own by default).

    A head is kept when it has a kept v dim; the q/k dims of other heads are dropped. A kept head without q/k
    dims attends uniformly. ValueError on masks of another shape or dtype.
    """
    if qk_mask.dim() != 2 or qk_mask.shape != v_mask.shape or {qk_mask.dtype, v_mask.dtype} != {torch.bool}:
        raise ValueError(
            "kept_heads takes two bool masks of one shape [heads, head_dim]; got "
            f"{qk_mask.dtype} {tuple(qk_mask.shape)} and {v_mask.dtype} {tuple(v_mask.shape)}"
        )
    H, K = v_mask.shape
    A = H * K
    qk, v = (_positions(mask) for mask in (qk_mask, v_mask))
    heads = [h for h in range(H) if v[h]]
    qk, v = [qk[h] for h in heads], [v[h] for h in heads]
    rows: list[int] = []
    starts = []
    for first, kept in ((0, qk), (A, qk), (2 * A, v)):
        starts.append([])
        for dims in kept:
            starts[-1].append(len(rows))
            rows += [first + i for i in dims] + [-1] * (align(len(dims)) - len(dims))
    packed_v = starts[2][0] if heads else 0
    columns = [i - 2 * A if i >= 0 else -1 for i in rows[packed_v:]]
    table = [
        (*(start[i] for start in starts), starts[2][i] - packed_v, align(len(qk[i])), align(len(v[i])))
        for i in range(len(heads))
    ]
    buckets = [next((w for w in WIDTHS if w >= max(fields[4:])), None) for fields in table]
    order = sorted(range(len(table)), key=lambda i: buckets[i] or K)
    return _one_buffer(
        KeptHeads,
        [list(chain(*qk)), _offsets(qk), list(chain(*v)), _offsets(v)],
        [
            rows,
            columns,
            _inverse(rows, 3 * A),
            _inverse(columns, A),
            [n for i in order for n in table[i]],
            order,
            *([0] * (buckets.count(width) + _MARKS_MORE) for width in WIDTHS),
        ],
        qk_mask.device if device is None else device,
        table=[-1, 6],
        whole_rows=[3, H, K],
        whole_columns=[H, K],
    )


def kept_neurons(mask: Tensor, device: torch.device | str | None = None) -> KeptNeurons:
    """The record of a bool mask [F] (True = kept), on `device` (the mask's own by default).

    ValueError on a mask of another shape or dtype.
    """
    if mask.dim() != 1 or mask.dtype != torch.bool:
        raise ValueError(f"kept_neurons takes a bool mask [F]; got {mask.dtype} {tuple(mask.shape)}")
    kept = mask.nonzero().flatten().tolist()
    rows = kept + [-1] * (align(len(kept)) - len(kept))
    return _one_buffer(
        KeptNeurons, [kept], [rows, _inverse(rows, len(mask))], mask.device if device is None else device
    )


def all_of(size: int, device: torch.device) -> Tensor:
    """Every position of 0..size, int32: an index that keeps all, and its own inverse."""
    # What is made while something traces belongs to that trace.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.arange(size, dtype=torch.int32, device=device)
    return _all_of(size, device)


@functools.lru_cache(64)
def _all_of(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(size, dtype=torch.int32, device=device)


def along(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """The bias where it may be packed along with its weight; None where only one of them is trained.

    Of what one call packs either all has gradients or nothing.
    """
    return bias if bias is not None and bias.requires_grad == weight.requires_grad else None


def counts_of(kept: Sequence[Tensor]) -> list[int]:
    """Heads per width of `WIDTHS`, from the marks (the last four fields of a `KeptHeads`)."""
    return [marks.shape[0] - _MARKS_MORE for marks in kept[-4:]]


def _positions(mask: Tensor) -> list[list[int]]:
    # Positions in 0..H*K of the True entries of each row.
    K = mask.shape[1]
    return [[h * K + i for i, on in enumerate(row) if on] for h, row in enumerate(mask.tolist())]


def _offsets(lists: Sequence[Sequence[int]]) -> list[int]:
    cut = [0]
    for entries in lists:
        cut.append(cut[-1] + len(entries))
    return cut


def _inverse(index: Sequence[int], size: int) -> list[int]:
    # Where `index` names position i, for i in 0..size; -1 where it does not.
    places = [-1] * size
    for place, i in enumerate(index):
        if i >= 0:
            places[i] = place
    return places


def _one_buffer(
    cls,
    wide: Sequence[list[int]],
    narrow: Sequence[list[int]],
    device: torch.device | str,
    **shapes: list[int],
):
    # int64 first, so that its views are aligned; `shapes` of fields that are not flat.
    fields = [torch.tensor(values, dtype=torch.int64, device="cpu") for values in wide]
    fields += [torch.tensor(values, dtype=torch.int32, device="cpu") for values in narrow]
    record = cls(torch.cat([t.view(torch.int32) for t in fields]), *fields)
    shaped = {name: getattr(record, name).view(shape) for name, shape in shapes.items()}
    return _moved(record._replace(**shaped), device)


def _moved(record, device: torch.device | str):
    flat = record.flat
    # From pinned memory the copy does not make the host wait; what torch.compile traces has none.
    to_gpu = torch.device(device).type == "cuda" and flat.device.type == "cpu"
    if to_gpu and not torch.compiler.is_compiling():
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    views, start = [], 0
    for field in record[1:]:
        end = start + field.numel() * field.element_size() // 4
        views.append(flat[start:end].view(field.dtype).view(field.shape))
        start = end
    return type(record)(flat, *views)

"""Attention and MLP whose structure lies in one device buffer: one captured graph, any structure.

    attention_fused, mlp_fused: the formulas of `attention` and `mlp`, with kept rows read in place

Shapes, launches and compiled code depend on the dense sizes alone. `envelope.write(...)` changes the
structure by one small copy, also between replays of a captured CUDA graph. What was removed costs no
arithmetic; memory is that of the dense layer. `attention` and `mlp` come here, too, where that was measured
to be faster than packing (`autotune.py`).
H heads, K head dim, A = H*K, F hidden; an envelope holds any structure.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _dispatch, _dtypes
from .attention import attention_reference
from .indices import WIDTHS, KeptHeads, KeptNeurons, align, kept_heads, kept_neurons
from .mlp import ACTIVATIONS, mlp_reference


class EnvelopeNeurons(NamedTuple):
    """The kept neurons, all int32 views of `flat`; made by `envelope_neurons`.

    count [1]: packed neurons, a multiple of 8; rows [F rounded up to a multiple of 8]: neuron of each, -1 is
    padding; whole [F]: packed place of each neuron, -1 is removed.
    """

    flat: Tensor
    count: Tensor
    rows: Tensor
    whole: Tensor

    def write(self, mask: Tensor) -> None:
        """Changes what is kept to a bool mask [F] by one copy; ValueError on another shape or dtype."""
        kept = kept_neurons(mask, "cpu")
        if len(mask) != len(self.whole):
            raise ValueError(f"write: the envelope is of {len(self.whole)} neurons, the mask of {len(mask)}")
        _copy(self, kept)


class EnvelopeHeads(NamedTuple):
    """The kept heads and dims, all int32 views of `flat`; made by `envelope_heads`.

    S, V [1]: packed rows and columns in use. rows [3 H (K rounded up to a multiple of 8)], columns [a third
    of that], whole_rows [3A], whole_columns [A] and table [H, 6] are those of `KeptHeads`, then -1 and, in
    the table, 0.
    """

    flat: Tensor
    S: Tensor
    V: Tensor
    rows: Tensor
    columns: Tensor
    whole_rows: Tensor
    whole_columns: Tensor
    table: Tensor

    def write(self, qk_mask: Tensor, v_mask: Tensor) -> None:
        """Changes what is kept to two bool masks [H, K] by one copy; ValueError on other shapes or dtypes."""
        kept = kept_heads(qk_mask, v_mask, "cpu")
        if qk_mask.numel() != len(self.whole_columns) or len(qk_mask) != len(self.table):
            H = len(self.table)
            raise ValueError(
                f"write: the envelope is of {[H, len(self.whole_columns) // max(1, H)]} heads and dims, "
                f"the masks of {list(qk_mask.shape)}"
            )
        _copy(self, kept)


def envelope_neurons(mask: Tensor, device: torch.device | str | None = None) -> EnvelopeNeurons:
    """The envelope of a bool mask [F] (True = kept), on `device` (the mask's own by default)."""
    envelope = _neurons(len(mask), mask.device if device is None else device)
    envelope.write(mask)
    return envelope


def envelope_heads(
    qk_mask: Tensor, v_mask: Tensor, device: torch.device | str | None = None
) -> EnvelopeHeads:
    """The envelope of two bool masks [H, K] (True = kept), on `device` (the masks' own by default)."""
    envelope = _heads(*v_mask.shape, qk_mask.device if device is None else device)
    envelope.write(qk_mask, v_mask)
    return envelope


def _neurons(hidden: int, device: torch.device | str) -> EnvelopeNeurons:
    return _views(EnvelopeNeurons, [[1], [align(hidden)], [hidden]], device)


def _heads(H: int, K: int, device: torch.device | str) -> EnvelopeHeads:
    shapes = [[1], [1], [3 * H * align(K)], [H * align(K)], [3 * H * K], [H * K], [H, 6]]
    return _views(EnvelopeHeads, shapes, device)


def _views(cls, shapes: list[list[int]], device: torch.device | str):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.full((sum(sizes),), -1, dtype=torch.int32, device=device)
    return cls(flat, *(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)))


def _fill(flat: Tensor, envelope: EnvelopeHeads | EnvelopeNeurons, kept: KeptHeads | KeptNeurons) -> None:
    # Each field of the envelope begins with that of the record; behind it -1, and 0 in the table.
    if isinstance(kept, KeptNeurons):
        fields = [len(kept.rows), kept.rows, kept.whole]
    else:
        index = [kept.rows, kept.columns, kept.whole_rows, kept.whole_columns]
        table = F.pad(kept.table, (0, 0, 0, len(envelope.table) - len(kept.table)))
        fields = [len(kept.rows), len(kept.columns), *index, table]
    start = 0
    for view, field in zip(envelope[1:], fields, strict=True):
        if isinstance(field, int):
            flat[start : start + 1].fill_(field)
        else:
            flat[start : start + field.numel()].copy_(field.flatten())
        start += view.numel()


def _copy(envelope: EnvelopeHeads | EnvelopeNeurons, kept: KeptHeads | KeptNeurons) -> None:
    host = torch.full(envelope.flat.shape, -1, dtype=torch.int32, device="cpu")
    _fill(host, envelope, kept)
    # From pinned memory the copy does not make the host wait.
    host = host.pin_memory() if envelope.flat.device.type == "cuda" else host
    envelope.flat.copy_(host, non_blocking=True)


def _mlp_reference(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, envelope, activation, gate_weight, gate_bias
):
    kept = kept_neurons(envelope.whole >= 0)
    return mlp_reference(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, kept, activation, gate_weight, gate_bias
    )


def _attention_reference(x, qkv_weight, qkv_bias, proj_weight, proj_bias, envelope, scale):
    A, H = len(envelope.whole_columns), len(envelope.table)
    qk, v = (whole >= 0 for whole in (envelope.whole_rows[:A], envelope.whole_columns))
    kept = kept_heads(qk.view(H, A // H), v.view(H, A // H))
    return attention_reference(x, qkv_weight, qkv_bias, proj_weight, proj_bias, kept, scale)


_dispatch.provide_reference("mlp_fused", _mlp_reference)
_dispatch.provide_reference("attention_fused", _attention_reference)


def _check_widths(op: str, **widths: int) -> None:
    for name, width in widths.items():
        if width % 8:
            raise ValueError(
                f"{op}: the width of {name} must be a multiple of 8, got {width}; "
                f"{op.removesuffix('_fused')} takes any"
            )


def mlp_fused(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    envelope: EnvelopeNeurons,
    activation: str = "gelu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """`mlp` over the neurons that `envelope` keeps when the kernels run.

    x [..., D], fc1_weight [F, D], fc1_bias [F] or None, fc2_weight [Dout, F], fc2_bias [Dout] or None,
    gate_weight and gate_bias as fc1's; D and Dout multiples of 8. Returns [..., Dout]. Gradients are
    full-size, zero where removed. ValueError on shapes that do not fit; RuntimeError in the backward pass
    when the envelope was written after the forward pass.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp_fused: unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    hidden, width = len(envelope.whole), x.shape[-1]
    for name, weight, wanted in (
        ("fc1_weight", fc1_weight, (hidden, width)),
        ("gate_weight", gate_weight, (hidden, width)),
        ("fc2_weight", fc2_weight, (fc2_weight.shape[0], hidden)),
    ):
        if weight is not None and weight.shape != wanted:
            raise ValueError(
                f"mlp_fused: {name} must be {list(wanted)} to fit x and envelope, got {list(weight.shape)}"
            )
    _check_widths("mlp_fused", x=width, fc2_weight=fc2_weight.shape[0])
    tensors = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias)
    _dtypes.check_dtypes("mlp_fused", x, *tensors)
    x = _dtypes.autocast(x)
    *weights, gate_weight, gate_bias = _dtypes.cast(x.dtype, *tensors)
    run = _dispatch.implementation("mlp_fused", x.device, x.dtype)
    return run(x, *weights, envelope, activation, gate_weight, gate_bias)


def attention_fused(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    envelope: EnvelopeHeads,
    scale: float,
) -> Tensor:
    """`attention` over the heads and dims that `envelope` keeps when the kernels run.

    x [B, N, D], qkv_weight [3A, D] (rows q, k, v), qkv_bias [3A] or None, proj_weight [Dout, A], proj_bias
    [Dout] or None; D and Dout multiples of 8, at most 128 dims a head. Returns [B, N, Dout]. Gradients are
    full-size, zero where removed. ValueError on shapes that do not fit; RuntimeError in the backward pass
    when the envelope was written after the forward pass.
    """
    if x.dim() != 3:
        raise ValueError(f"attention_fused: x must be [batch, tokens, width], got shape {tuple(x.shape)}")
    A, H = len(envelope.whole_columns), len(envelope.table)
    for name, weight, wanted in (
        ("qkv_weight", qkv_weight, (3 * A, x.shape[2])),
        ("proj_weight", proj_weight, (proj_weight.shape[0], A)),
    ):
        if weight.shape != wanted:
            raise ValueError(
                f"attention_fused: {name} must be {list(wanted)} to fit x and envelope, "
                f"got {list(weight.shape)}"
            )
    if A > 128 * H:
        raise ValueError(f"attention_fused: heads have {A // H} dims, more than 128; attention takes any")
    _check_widths("attention_fused", x=x.shape[2], proj_weight=proj_weight.shape[0])
    tensors = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    _dtypes.check_dtypes("attention_fused", x, *tensors)
    x = _dtypes.autocast(x)
    run = _dispatch.implementation("attention_fused", x.device, x.dtype)
    return run(x, *_dtypes.cast(x.dtype, *tensors), envelope, scale)


# Of the record that `kept.flat` belongs to, for as long as that lives.
_envelopes = WeakTensorKeyDictionary()


def _envelope_of(kept: KeptHeads | KeptNeurons) -> EnvelopeHeads | EnvelopeNeurons:
    """The envelope that keeps what a record keeps, made on its device without waiting for it."""
    if kept.flat not in _envelopes:
        device = kept.flat.device
        heads = isinstance(kept, KeptHeads)
        # The first call may be an evaluation, the next one may need gradients.
        with torch.inference_mode(False), torch.no_grad():
            envelope = (
                _heads(*kept.whole_columns.shape, device) if heads else _neurons(len(kept.whole), device)
            )
            _fill(envelope.flat, envelope, kept)
        _envelopes[kept.flat] = envelope
    return _envelopes[kept.flat]


def attention_in_place(x: Tensor, *arguments) -> Tensor:
    """`uvc_kernels.attention` of these arguments."""
    *weights, kept, scale = arguments[:6]
    return attention_fused(x, *_dtypes.cast(x.dtype, *weights), _envelope_of(kept), scale)


def mlp_in_place(x: Tensor, *arguments) -> Tensor:
    """`uvc_kernels.mlp` of these arguments."""
    *weights, kept, activation = arguments[:6]
    weights, gate = (_dtypes.cast(x.dtype, *tensors) for tensors in (weights, arguments[6:8]))
    return mlp_fused(x, *weights, _envelope_of(kept), activation, *gate)


WAYS = {"attention": attention_in_place, "mlp": mlp_in_place}


def serves(op: str, arguments: Sequence) -> bool:
    """Whether `WAYS[op]` can run these arguments: on a GPU, widths of multiples of 8, short heads."""
    x, _, _, last, _, kept, *_ = arguments
    fits = x.shape[-1] % 8 == 0 and last.shape[0] % 8 == 0
    if isinstance(kept, KeptHeads):
        fits = fits and kept.whole_columns.shape[1] <= WIDTHS[-1]
    # On the CPU Triton is an interpreter.
    return fits and x.device.type == "cuda" and _dispatch.serves(f"{op}_fused", "triton", x.device, x.dtype)

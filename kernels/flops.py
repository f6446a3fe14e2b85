"""What torch's `FlopCounterMode` counts for the ops: two FLOPs per multiply-accumulate of what is kept.

    attention   qkv M D (2Q+V),   scores and values M N (Q+V),   projection M V Dout
    mlp         M D F,   with a gate once more,   M F Dout
    backward    both gradients of each product, where asked for, and the scores once more, as torch counts its
                own flash attention; what was not saved for it (recompute) counts again

B batch, N tokens, M = B*N, D width; Q and V kept q/k and v dims over all heads, F kept neurons. Padding
counts nothing. Importing this file registers the formulas; `uvc.layers` does.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _dispatch
from .packed.pieces import SUFFIXES

Arguments = dict[str, Tensor | None]


def attention(given: Arguments, asked: set[str] | None) -> int:
    """FLOPs of the forward pass, or where gradients are `asked` for of the backward pass."""
    B, N, D = given["x"].shape
    Q, V = len(given["qk"]), len(given["v"])
    qkv, projection = D * (2 * Q + V), V * len(given["proj_weight"])
    if asked is None:
        return 2 * B * N * (qkv + N * (Q + V) + projection)
    macs = qkv * len(asked & {"x", "qkv_weight"}) + projection * ("proj_weight" in asked)
    if asked & {"x", "qkv_weight", "qkv_bias", "bias"}:
        macs += projection + N * (3 * Q + 2 * V) + (0 if len(given["qkv"]) else qkv)
    return 2 * B * N * macs


def mlp(given: Arguments, asked: set[str] | None) -> int:
    """FLOPs of the forward pass, or where gradients are `asked` for of the backward pass."""
    *rows, D = given["x"].shape
    F, out = len(given["neurons"]), len(given["fc2_weight"])
    hidden = D * (1 if given["gate_weight"] is None else 2)
    if asked is None:
        macs = hidden + out
    else:
        macs = hidden * ("x" in asked) + D * len(asked & {"fc1_weight", "gate_weight"})
        macs += out * ("fc2_weight" in asked) + out * bool(asked - {"fc2_weight", "fc2_bias"})
        macs += hidden * (not len(given["hidden"]) and bool(asked - {"fc2_bias"}))
    return 2 * torch.Size(rows).numel() * F * macs


def _register(name: str, formula: Callable[[Arguments, set[str] | None], int]) -> None:
    op = getattr(torch.ops.uvc_kernels, name)
    names = [argument.name for argument in op.default._schema.arguments]
    gradients = [result.name for result in op.default._schema.returns]

    def count(*arguments, out_val=None, **keywords) -> int:
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        asked = None
        if "needs" in given:
            asked = {gradient for i, gradient in enumerate(gradients) if given["needs"] >> i & 1}
        return formula(given, asked)

    register_flop_formula(op, get_raw=True)(count)


_NAMES = {
    attention: (("attention", "attend"), ("attention_with_positions", "attend_with_positions")),
    mlp: (("mlp", "packed_mlp"),),
}
for _formula, _ops in _NAMES.items():
    for (_name, _packed), _kind in itertools.product(_ops, ("", "_backward")):
        for _suffix in SUFFIXES:
            _register(f"{_packed}{_kind}_{_suffix}", _formula)
        if _dispatch.extension_error is None:
            _register(f"{_name}{_kind}", _formula)

"""The activation of an MLP's hidden units in one pass, forward and backward, with or without a gate.

    a = act(u)            du = da * act'(u)
    a = act(g) * u        du = da * act(g),   dg = da * u * act'(g)         (silu: SwiGLU, gelu: GEGLU)

The backward pass computes a again, so that only u and g are kept between the passes.
"""

import itertools

import triton
import triton.language as tl
from torch import Tensor

from ..mlp import ACTIVATIONS
from .launch import DTYPES, ELEMENT, Case, eights, narrow, wide

BLOCK = 1024


@triton.jit
def _sigmoid(z):
    # sigmoid(z) and 1 - sigmoid(z), neither by a difference.
    fade = tl.exp(-tl.abs(z))
    near, far = 1.0 / (1.0 + fade), fade / (1.0 + fade)
    return tl.where(z > 0, near, far), tl.where(z > 0, far, near)


@triton.jit
def _factor(z, ACT: tl.constexpr):
    # act(z) = z * factor(z); returns the factor and its derivative.
    if ACT == "gelu":
        factor = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        # (1 + tanh y) / 2 = sigmoid(2 y)
        factor, rest = _sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
        slope = factor * rest * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
    elif ACT == "relu":
        factor = tl.where(z > 0, 1.0, 0.0)
        slope = factor * 0.0
    elif ACT == "silu":
        factor, rest = _sigmoid(z)
        slope = factor * rest
    else:
        factor, rest = _sigmoid(1.702 * z)
        slope = 1.702 * factor * rest
    return factor, slope


@triton.jit
def act(z, ACT: tl.constexpr):
    """act(z) and act'(z), elementwise."""
    factor, slope = _factor(z, ACT)
    return z * factor, factor + z * slope


@triton.jit(do_not_specialize=("size",))
def _forward(u, gate, a, size, ACT: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    size = eights(size)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + i, mask=i < size, other=0.0).to(ACC)
    if GATED:
        open_, _ = act(tl.load(gate + i, mask=i < size, other=0.0).to(ACC), ACT)
        value *= open_
    else:
        value, _ = act(value, ACT)
    tl.store(a + i, narrow(value, a.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=("size",))
def _backward(u, gate, grad_a, a, grad_u, grad_gate, size, ACT: tl.constexpr, GATED: tl.constexpr,
              ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    size = eights(size)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + i, mask=i < size, other=0.0).to(ACC)
    grad = tl.load(grad_a + i, mask=i < size, other=0.0).to(ACC)
    if GATED:
        open_, slope = act(tl.load(gate + i, mask=i < size, other=0.0).to(ACC), ACT)
        tl.store(a + i, narrow(value * open_, a.dtype.element_ty), mask=i < size)
        tl.store(grad_u + i, narrow(grad * open_, a.dtype.element_ty), mask=i < size)
        tl.store(grad_gate + i, narrow(grad * value * slope, a.dtype.element_ty), mask=i < size)
    else:
        active, slope = act(value, ACT)
        tl.store(a + i, narrow(active, a.dtype.element_ty), mask=i < size)
        tl.store(grad_u + i, narrow(grad * slope, a.dtype.element_ty), mask=i < size)


def activate(u: Tensor, gate: Tensor | None, activation: str, a: Tensor) -> None:
    """Writes `a`; contiguous tensors of one shape whose size is a multiple of 8."""
    if u.numel():
        _forward[(triton.cdiv(u.numel(), BLOCK),)](
            u, u if gate is None else gate, a, u.numel(),
            ACT=activation, GATED=gate is not None, ACC=wide(u.dtype), BLOCK=BLOCK,
        )  # fmt: skip


def activate_backward(
    u: Tensor, gate: Tensor | None, grad_a: Tensor, activation: str,
    a: Tensor, grad_u: Tensor, grad_gate: Tensor | None,
) -> None:  # fmt: skip
    """Writes `a` again, and `grad_u` and `grad_gate` from `grad_a`; `grad_gate` is None without a gate."""
    if u.numel():
        _backward[(triton.cdiv(u.numel(), BLOCK),)](
            u, u if gate is None else gate, grad_a, a, grad_u, u if grad_gate is None else grad_gate,
            u.numel(),
            ACT=activation, GATED=gate is not None, ACC=wide(u.dtype), BLOCK=BLOCK,
        )  # fmt: skip


def cases() -> list[Case]:
    """Everything the two can launch."""
    found = []
    for kernel, dtype, name, gated in itertools.product(
        (_forward, _backward), DTYPES, ACTIVATIONS, (False, True)
    ):
        signature = {name: f"*{ELEMENT[dtype]}" for name in kernel.arg_names[:-5]} | {"size": "i32"}
        constants = {"ACT": name, "GATED": gated, "ACC": wide(dtype), "BLOCK": BLOCK}
        label = f"{ELEMENT[dtype]} {name}{' gated' if gated else ''}"
        found.append(Case(kernel, label, signature, constants))
    return found

"""Whether a layer may read the weights of its children, which is fast, or must call them.

A child that is no longer the module timm made (a LoRA adapter, an int8 layer), that carries hooks, or whose
weight is computed on the way (weight_norm, torch.nn.utils.prune, parametrizations), does more than its
weights say.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.module_tracker import ModuleTracker
from uvc_kernels.warn_once import warn_once

from uvc.layers.prunable import Prunable

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# With them come sets of hook ids: which take keyword arguments, which run after an error.
HOOK_OPTIONS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
GLOBAL_HOOKS = tuple(
    getattr(torch_module, f"_global_{kind}")
    for kind in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
)
# fmt: off
LINEARS = (
    "qkv", "in_proj", "q_proj", "k_proj", "v_proj", "proj", "out_proj", "gate",
    "fc1", "fc1_g", "fc1_x", "fc2", "w0", "w1", "w2",
)
# fmt: on
# The second is torch's own under nn.MultiheadAttention, and computes the same.
LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
DROPS = (nn.Dropout, nn.Identity)
# What a layer may read instead of calling, or pass over.
PLAIN = {
    **dict.fromkeys(LINEARS, LINEAR),
    **dict.fromkeys(("attn_drop", "drop1"), DROPS),
}
# Subclasses (DTensor, quantised tensors) compute in ways of their own.
WEIGHTS = (nn.Parameter, torch.Tensor)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else."""
    return (
        not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
    )


def is_plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is no more than a product with its weight and the sum with its bias."""
    return (
        type(linear) in LINEAR and type(linear._parameters.get("weight")) in WEIGHTS and is_untouched(linear)
    )


def product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """linear(x), from its weights where calling it is no more than that: a call takes 2 us of Python."""
    if x.dim() > 2 and writes_onnx():
        # ONNX has a product that adds its bias for matrices alone, and ONNX Runtime does not fuse the two.
        return linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    if hooked_everywhere() or not is_plain(linear):
        return linear(x)
    parameters = linear._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])


def normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """norm(x), from its weights where it is a plain LayerNorm: a call takes 4 us of Python.

    What is read here is checked in each pass of a compiled program.
    """
    timms = isinstance(norm, LayerNorm)
    if type(norm) is not (LayerNorm if timms else nn.LayerNorm) or hooked_everywhere():
        return norm(x)
    if (timms and norm._fast_norm) or not runs_as_it_is(norm):  # the fast one reads autocast's dtype
        return norm(x)
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    return norm(x) if weight is None else torch.layer_norm(x, weight.shape, weight, bias, norm.eps)


def runs_as_it_is(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward, nothing else, and not compiled on its own."""
    return is_untouched(module) and module._compiled_call_impl is None


def hooked_everywhere() -> bool:
    """Whether hooks are set on all modules there are."""
    before, after, back_before, back = GLOBAL_HOOKS
    return bool(before or after or back_before or back)


def sums_in_products(x: torch.Tensor) -> bool:
    """Whether a product begins with what it is added to: in compiled programs on CPUs, in float32."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu")


def product_onto(
    x: torch.Tensor, linear: nn.Module, read: torch.Tensor, gamma: torch.Tensor | None = None
) -> torch.Tensor:
    """x + linear(read), or x + gamma * linear(read); the former, where that is worth it, in a product that
    begins with x and its bias.
    """
    begins_with_x = gamma is None and sums_in_products(x) and is_plain(linear)
    if not begins_with_x or linear._parameters["bias"] is None:
        branch = product(linear, read if x.dim() > 2 else read.flatten(0, -2))
        return x + (branch if gamma is None else branch * gamma)
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    total = torch.addmm(x.flatten(0, -2) + bias, read.flatten(0, -2), weight.t())
    return total.unflatten(0, x.shape[:-1])


def writes_onnx() -> bool:
    """Whether this is a trace from which an ONNX program is made."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def watched() -> bool:
    """Whether hooks are set on all modules there are, other than those that only note where a program is."""
    if not hooked_everywhere():
        return False
    hooks = (hook for kind in GLOBAL_HOOKS for hook in kind.values())
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def kind_of(module: nn.Module) -> str:
    """A module's class, with its package where the name alone would mislead."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == "Linear" else kind.__name__


def change(name: str, child: nn.Module, hooks: bool, weight: bool) -> str | None:
    """What makes the child `name` do more than its weights and settings say; None when nothing does.

    hooks, weight: whether hooks count, and a weight that is computed on the way.
    """
    # What compaction made in the place of a linear layer does what the dense one did.
    plain = None if getattr(child, "is_compact", False) else PLAIN.get(name)
    if plain is not None and type(child) not in plain:
        return f"{name} is a {kind_of(child)}, not a plain {plain[0].__name__}"
    if (
        weight
        and plain is not None
        and name in LINEARS
        and type(child._parameters.get("weight")) not in WEIGHTS
    ):
        return f"{name} has a weight that is no plain parameter"
    if name == "act" and has_weights(child):
        return f"{name} is a {kind_of(child)} with weights of its own"
    if hooks and any(getattr(child, kind) for kind in HOOKS):
        return f"{name} has hooks"
    if hooks and "forward" in vars(child):
        return f"{name} has a forward of its own"
    return None


def has_weights(act: nn.Module) -> bool:
    """Whether an activation may differ from neuron to neuron."""
    return any(t.numel() > 1 for t in (*act.parameters(), *act.buffers()))


def first_change(layer: nn.Module, hooks: bool = True, weight: bool = True) -> str | None:
    """`change` of the first child of an attention or MLP that has one.

    What comes last, a dropout of the output, is called wherever the layer runs, and so may be anything.
    """
    children = [(name, child) for name, child in layer.named_children() if name not in ("proj_drop", "drop2")]
    return next(filter(None, (change(name, child, hooks, weight) for name, child in children)), None)


def linear_fault(layer: nn.Module, *names: str) -> str | None:
    """Which of these children is no linear layer; of a layer that can call its children, not even in kind."""
    for name in names:
        child = getattr(layer, name)
        like = isinstance(layer, Prunable) and isinstance(getattr(child, "in_features", None), int)
        if type(child) not in LINEAR and not like:
            return f"{name} is a {kind_of(child)}, not a plain nn.Linear"
    return None


def drop_rate(drop: nn.Module | None) -> float:
    """The share that one of `DROPS` zeroes now; None: none is there."""
    return drop.p if type(drop) is nn.Dropout and drop.training else 0.0


def say_called(layer: nn.Module, x: torch.Tensor) -> None:
    """Say, once, that `layer` calls its children on x and so computes what is removed, too."""
    if x.is_meta:
        return  # where nothing is computed, and no index can be read
    reason = first_change(layer) or "hooks are set on all modules"
    warn_once(f"{type(layer).__name__}: {reason}; its children are called, at the cost of the dense layer")


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Put the hooks of `old` on `new`, too, which takes its place in a copy."""
    for kind in (*HOOKS, *HOOK_OPTIONS):
        setattr(new, kind, copy.copy(getattr(old, kind)))
    new._is_full_backward_hook = old._is_full_backward_hook


def drop_hooks(modules: Iterable[nn.Module]) -> None:
    """Leave no hooks on modules that are never called."""
    for module in modules:
        for kind in (*HOOKS, *HOOK_OPTIONS):
            getattr(module, kind).clear()

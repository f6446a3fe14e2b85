"""The classes of a block's parts by their names in a config, and the names of those in a model."""

import functools
from collections.abc import Callable
from typing import Any

import timm.layers
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import nn

from uvc.layers import Thing, UVCGeGluMlp, UVCGluMlp, UVCMlp, UVCSwiGLU

BLOCKS = (
    "Block",
    "ResPostBlock",
    "ParallelScalingBlock",
    "ParallelScalingBlock, one last product",
    "DiffParallelScalingBlock",
    "ParallelThingsBlock",
)
# Of blocks that have several, entries in a structure.
ENTRIES = {"ParallelThingsBlock": 2}
NORMS = {
    "LayerNorm": nn.LayerNorm,
    "timm.LayerNorm": timm.layers.LayerNorm,
    "timm.LayerNormFp32": timm.layers.LayerNormFp32,
    "timm.RmsNorm": timm.layers.RmsNorm,
}
MLPS = {
    "Mlp": UVCMlp,
    "GluMlp": UVCGluMlp,
    "GluMlp, gate first": functools.partial(UVCGluMlp, gate_last=False),
    "SwiGLU": UVCSwiGLU,
    "GeGluMlp": UVCGeGluMlp,
}
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "mish": nn.Mish,
    "timm.gelu": timm.layers.activations.GELU,
    "timm.gelu_tanh": timm.layers.activations.GELUTanh,
    "timm.quick_gelu": timm.layers.activations.QuickGELU,
}
# Of models whose arguments say them.
PARTS = {
    "block": "Block",
    "norm": {"name": "LayerNorm", "eps": 1e-6},
    "mlp": "Mlp",
    "activation": "gelu",
}


def parts_of(block: nn.Module, name: str) -> dict[str, Any]:
    """The classes of a block's parts; ValueError, naming the part, for one that is not known."""
    parallel = isinstance(block, ParallelScalingBlock | DiffParallelScalingBlock)
    norm = "in_norm" if parallel else "norm1"
    first = getattr(block, norm)
    return {
        "block": BLOCKS[which_of(block)],
        "norm": {"name": name_of(first, f"{name}.{norm}", NORMS), "eps": first.eps},
        "mlp": "Mlp" if parallel else name_of(block.mlp, f"{name}.mlp", MLPS),
        "activation": name_of(block.mlp.act, f"{name}.mlp.act", ACTIVATIONS),
    }


def which_of(block: nn.Module) -> int:
    """The place of a block's class in `BLOCKS`, for classes that have more than one."""
    if isinstance(block, ParallelScalingBlock):
        return 2 if block.out_proj is None else 3
    if isinstance(block, Thing):
        return 5
    return 4 if isinstance(block, DiffParallelScalingBlock) else int(block.norm_last)


def name_of(module: nn.Module, path: str, table: dict[str, Callable[..., nn.Module]]) -> str:
    """The entry of `table` that makes modules like `module`; ValueError naming `path` when there is none."""
    for name, make in table.items():
        kind = make.func if isinstance(make, functools.partial) else make
        settings = make.keywords if isinstance(make, functools.partial) else {}
        default = {nn.GELU: {"approximate": "none"}, UVCGluMlp: {"gate_last": True}}.get(kind, {})
        if type(module) is kind and all(getattr(module, k) == v for k, v in {**default, **settings}.items()):
            return name
    raise ValueError(f"cannot save: {path} is a {type(module).__name__}; {', '.join(table)} can be saved")

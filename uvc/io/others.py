"""How models of transformers and torchvision are made again: from their config, or their arguments."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from uvc.io.arguments import Arguments, Maker
from uvc.layers import blocks_of, facts_of, seen

# Of transformers; a class outside this list is never made from a file.
NAMES = (
    "ViTModel ViTForImageClassification DeiTModel DeiTForImageClassification "
    "DeiTForImageClassificationWithTeacher Dinov2Model Dinov2ForImageClassification Dinov2WithRegistersModel "
    "Dinov2WithRegistersForImageClassification DINOv3ViTModel CLIPVisionModel CLIPVisionModelWithProjection "
    "SiglipVisionModel"
).split()
# What of a config tells how a model is computed, or may name code.
_UNSAID = {"auto_map", "quantization_config", "transformers_version", "attn_implementation", "dtype"}


def of_transformers(dense: nn.Module) -> Arguments:
    """The config of a model, as far as it travels as JSON."""
    return {"config": _plain(dense.config)}


def _plain(config: Any) -> dict[str, Any]:
    """What a config of its class says, without what it does not know."""
    known = type(config)().to_dict().keys()
    said = config.to_dict().items()
    return {k: v for k, v in said if k in known and k not in _UNSAID and not k.startswith("_")}


def _made(name: str, config: dict[str, Any]) -> nn.Module:
    cls = getattr(importlib.import_module("transformers"), name)
    if not isinstance(config, dict):
        raise ValueError(f"config must be an object, got {config!r:.60}")
    known = cls.config_class().to_dict().keys() - _UNSAID
    foreign = sorted(k for k in config if k not in known or k.startswith("_"))
    if foreign:
        raise ValueError(f"config has the unknown field {foreign[0]}")
    return cls(cls.config_class.from_dict(copy.deepcopy(config)))


def of_torchvision(dense: nn.Module) -> Arguments:
    """The arguments of torchvision's VisionTransformer."""
    block = seen(blocks_of(dense)[0])
    return {
        "image_size": dense.image_size,
        "patch_size": dense.patch_size,
        "num_layers": len(blocks_of(dense)),
        "num_heads": block.attn.num_heads,
        "hidden_dim": dense.hidden_dim,
        "mlp_dim": dense.mlp_dim,
        "dropout": dense.dropout,
        "attention_dropout": dense.attention_dropout,
        "num_classes": dense.num_classes,
        "representation_size": dense.representation_size,
    }


_TORCHVISION = frozenset(
    "image_size patch_size num_layers num_heads hidden_dim mlp_dim dropout attention_dropout num_classes "
    "representation_size".split()
)


def _made_by_torchvision(**arguments) -> nn.Module:
    return importlib.import_module("torchvision.models").VisionTransformer(**arguments)


def _maker(make: Callable[..., nn.Module], read: Callable[[nn.Module], Arguments], names: frozenset) -> Maker:
    return Maker(make, read, names, frozenset(), (), (None, None))


def _of(name: str) -> Callable[..., nn.Module]:
    return lambda config: _made(name, config)


# By package and class.
OTHERS = {
    **{f"transformers.{n}": _maker(_of(n), of_transformers, frozenset({"config"})) for n in NAMES},
    "torchvision.VisionTransformer": _maker(_made_by_torchvision, of_torchvision, _TORCHVISION),
}


def name_of_other(model: nn.Module) -> str | None:
    """The name in `OTHERS` of a model of transformers or torchvision; None of any other."""
    if facts_of(model) is None:
        return None
    return f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"


@torch.no_grad()
def fill_from_new(model: nn.Module, device: str | torch.device) -> None:
    """Compute buffers on the meta device that are in no file, as a new model of this config has them."""
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if missing:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = 0
        with torch.device("cpu"):
            new = dict(type(model)(config).named_buffers())
        dtype = next(p.dtype for p in model.parameters())
        for name in missing:
            path, _, own = name.rpartition(".")
            buffer = new[name].to(dtype) if new[name].is_floating_point() else new[name]
            model.get_submodule(path)._buffers[own] = buffer.to(device)

"""Small models of transformers and torchvision, made from configs, and their truth."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from uvc.layers import named_blocks
from uvc.structure import Structure

SIZES = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=36,
    image_size=16,
    patch_size=4,
)
FREE = {"heads": 1, "qk": 1, "v": 1, "neurons": 1}
MODELS = {
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit classifier": ("ViTForImageClassification", "ViTConfig", dict(num_labels=5)),
    "deit": ("DeiTModel", "DeiTConfig", dict(hidden_act="gelu_new")),
    "dinov2": ("Dinov2Model", "Dinov2Config", dict(mlp_ratio=2)),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", dict(mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2 with registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        dict(mlp_ratio=2, num_register_tokens=2),
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", dict(num_register_tokens=2)),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", dict(hidden_act="quick_gelu")),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "torchvision": None,
}


class Outputs(nn.Module):
    """All outputs of a model in one tensor, so that the truth's functions can read it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out if isinstance(out, Tensor) else torch.cat([t.flatten(1) for t in out.to_tuple()], dim=1)


def made(name: str) -> nn.Module:
    """A small model in evaluation, all its weights random."""
    if MODELS[name] is None:
        torchvision = pytest.importorskip("torchvision")
    else:
        transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    if MODELS[name] is None:
        model = torchvision.models.VisionTransformer(16, 4, 2, 3, 24, 36, num_classes=5)
    else:
        cls, config, own = MODELS[name]
        model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES, **own))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def images(model: nn.Module) -> Tensor:
    """Two random images, of the dtype of its weights."""
    return torch.randn(2, 3, 16, 16, dtype=next(model.parameters()).dtype)


def read(model: nn.Module, x: Tensor) -> Tensor:
    """All outputs of a model in one tensor."""
    return Outputs(model)(x)


def absent(model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
    """The outputs of their own model without the contributions that `structure` removes."""
    parameters, handles = dict(model.named_parameters()), []
    for (name, block), kept in zip(named_blocks(model).items(), structure.blocks, strict=True):
        children = dict(block.named_modules())
        first = next(n for n in ("attention", "self_attn", "self_attention", "attn") if n in children)
        out = next(n for n in ("o_proj", "out_proj") if n in children[first]._modules)
        second = next(n for n in ("fc2", "down_proj", "3") if n in children["mlp"]._modules)
        # Gemma 4's layers that clip hold their linear layer.
        inner = ".linear" if f"{first}.{out}.linear" in children else ""
        out, second = out + inner, second + inner
        A = children[f"{first}.{out}"].in_features
        q, v = torch.zeros(A), torch.zeros(A)
        for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
            q[[head * A // 3 + d for d in qk_dims]] = 1
            v[[head * A // 3 + d for d in v_dims]] = 1
        neurons = torch.zeros(children[f"mlp.{second}"].in_features)
        neurons[list(kept.neurons)] = 1
        whole = torch.cat([q, torch.ones(2 * A)])
        masks = {f"{first}.q_proj{inner}.weight": q[:, None], f"{first}.q_proj.bias": q}
        masks |= {f"{first}.in_proj_weight": whole[:, None], f"{first}.in_proj_bias": whole}
        for part, mask in {**masks, f"{first}.{out}.weight": v, f"mlp.{second}.weight": neurons}.items():
            if (path := f"{name}.{part}") in parameters:
                parameters[path] = parameters[path] * mask.to(parameters[path])
        for runs, half in ((kept.attn, first), (kept.mlp, "mlp")):
            if not runs:
                handles.append(children[half].register_forward_hook(_nothing))
    out = functional_call(Outputs(model), {f"model.{n}": p for n, p in parameters.items()}, (x,))
    for handle in handles:
        handle.remove()
    return out


def _nothing(module: nn.Module, inputs: tuple, out: Tensor | tuple) -> Tensor | tuple:
    return out * 0.0 if isinstance(out, Tensor) else (out[0] * 0.0, *out[1:])

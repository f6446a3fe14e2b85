"""Small models with lively values, and the same as transformers has them, for tests of `load_weights`."""

import warnings

import pytest
import timm
import torch

import uvc

# Of two models in float32 that sum in another order; outputs are of the order of 1.
CLOSE = dict(rtol=1e-5, atol=2e-5)
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=5)


def lively(model, seed=1):
    """The model with values that show where each of them ends up, biases and positions too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + ("norm" in name) * ("weight" in name))
    return model.eval()


def vit(name="vit_tiny_patch16_224", seed=None, **options):
    model = timm.create_model(name, **{**SMALL, **options})
    return model.eval() if seed is None else lively(model, seed)


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


def quietly(model, path):
    """`load_weights`, which must have nothing to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uvc.load_weights(model, path) == ()
    return model


def same(model, weights):
    found = model.state_dict()
    assert list(found) == list(weights)
    return all(torch.equal(found[name], weights[name]) for name in weights)


# Of transformers: its model, and what timm calls the same.
def of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    sizes |= dict(layer_norm_eps=1e-6, num_labels=5)
    wide = dict(intermediate_size=48)
    dinov2 = dict(mlp_ratio=2, layerscale_value=0.5)
    t, dino = transformers, dict(init_values=1.0, num_classes=0)
    kinds = {
        "ViT": (t.ViTForImageClassification, t.ViTConfig(**sizes, **wide), vit),
        "ViT without biases of qkv": (
            t.ViTForImageClassification,
            t.ViTConfig(**sizes, **wide, qkv_bias=False),
            lambda: vit(qkv_bias=False),
        ),
        "DeiT with its teacher's head": (
            t.DeiTForImageClassificationWithTeacher,
            t.DeiTConfig(**sizes, **wide),
            lambda: vit("deit_tiny_distilled_patch16_224"),
        ),
        "DINOv2": (
            t.Dinov2Model,
            t.Dinov2Config(**sizes, **dinov2),
            lambda: vit("vit_small_patch14_dinov2", **dino),
        ),
        "DINOv2 with registers": (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**sizes, **dinov2),
            lambda: vit("vit_small_patch14_reg4_dinov2", **dino),
        ),
        "DINOv2 giant": (
            t.Dinov2Model,
            t.Dinov2Config(**sizes, **dinov2, use_swiglu_ffn=True),
            lambda: vit("vit_giant_patch14_dinov2", **dino | {"mlp_ratio": 64.5 / 24}),
        ),
        "ViT-MAE": (
            t.ViTMAEModel,
            t.ViTMAEConfig(**sizes, **wide, mask_ratio=0.0),
            lambda: vit("vit_base_patch16_224.mae", num_classes=0),
        ),
    }
    make, config, mine = kinds[kind]
    return lively(make(config)), mine()

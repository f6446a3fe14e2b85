"""Models that `convert` cannot serve: one line that names the layer, and the model stays as it was."""

import pytest
import timm
import torch
from oracle import small_vit
from timm.layers import LayerNorm
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

import uvc
from uvc.layers import UVCBlock


class OwnAttention(timm.layers.Attention):
    pass


class OfAnotherClass(nn.Linear):
    """A linear layer that might compute anything."""


def with_child(path: str, child: nn.Module, **changes) -> nn.Module:
    model = small_vit(**changes)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, child)
    return model


UNSUPPORTED = {
    r"blocks\.2\.mlp is a GatedMlp": lambda: with_child("blocks.2.mlp", timm.layers.GatedMlp(24, 40)),
    r"blocks\.0\.mlp is a GlobalResponseNormMlp": lambda: with_child(
        "blocks.0.mlp", timm.layers.GlobalResponseNormMlp(24, 40)
    ),
    r"blocks\.1\.attn is a OwnAttention": lambda: with_child("blocks.1.attn", OwnAttention(24, 4)),
    r"blocks\.0\.mlp\.fc1 is a Conv2d": lambda: with_child(
        "blocks.0.mlp", timm.layers.Mlp(24, 40, use_conv=True)
    ),
    r"blocks\.0\.attn\.qkv is a OfAnotherClass": lambda: with_child(
        "blocks.0.attn.qkv", OfAnotherClass(24, 72)
    ),
    r"blocks\.1\[1\]\.mlp is a GatedMlp": lambda: with_child(
        "blocks.1.ffns.1.mlp", timm.layers.GatedMlp(24, 40), block_fn=ParallelThingsBlock
    ),
    r"the model is a ResNet of resnet, without lists of transformer": lambda: timm.create_model("resnet18"),
    r"blocks\.0 is a Block of convit": lambda: timm.create_model("convit_tiny"),
    r"blocks\.0 is a Sequential": lambda: timm.create_model("mixnet_s"),
    r"the model is a Sequential of container, without lists": lambda: nn.Sequential(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("says", UNSUPPORTED)
def test_an_unsupported_model_is_an_error_that_names_the_layer(says):
    with torch.device("meta"):
        model = UNSUPPORTED[says]()
    for call in (uvc.convert, uvc.cost, uvc.structure_of, uvc.compact):
        with pytest.raises(ValueError, match=says) as caught:
            call(model)
        assert "\n" not in str(caught.value)
    assert not any(isinstance(m, UVCBlock | uvc.UVCAttention | uvc.UVCMlp) for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "mask"),
    [
        (
            lambda: uvc.UVCAttention(24, 4, qk_norm=True, norm_layer=LayerNorm),
            lambda m: m.set_kept(torch.eye(4, 6) > 0, None),
        ),
        (lambda: uvc.UVCMlp(24, 40, norm_layer=LayerNorm), lambda m: m.set_kept(torch.arange(40) > 3)),
    ],
    ids=["q_norm", "mlp norm"],
)
def test_what_a_norm_is_over_cannot_be_removed_in_part(layer, mask):
    module = layer()
    assert module(torch.randn(2, 5, 24)).isfinite().all()
    with pytest.raises(ValueError, match="norm is a LayerNorm, whose statistics are over all of them"):
        mask(module)


@pytest.mark.parametrize(
    "name",
    [
        "deit_small_patch16_224",
        "deit_base_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_tiny_patch16_224",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
        "vit_betwixt_patch16_reg4_gap_256",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_rpn_224",
        "vit_tiny_r_s16_p8_224",
    ],
)
def test_the_timm_families_are_served(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    assert list(uvc.convert(model).state_dict()) == keys
    assert uvc.cost(model).params == sum(p.numel() for p in model.parameters())

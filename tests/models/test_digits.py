"""The small ViTs for digits: registered with timm, of the announced size, and timm's own classes."""

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import uvc.models

MODELS = {
    "uvc_vit_digits": (VisionTransformer, 17),
    "uvc_vit_digits_distilled": (VisionTransformerDistilled, 18),
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_creates_it_by_name(name):
    assert name in uvc.models.__all__
    model = timm.create_model(name)
    model_class, tokens = MODELS[name]
    assert type(model) is model_class
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert model.forward_features(torch.zeros(2, 1, 8, 8)).shape == (2, tokens, 96)
    assert 0.6e6 < sum(p.numel() for p in model.parameters()) < 0.75e6


@pytest.mark.parametrize("name", MODELS)
def test_its_arguments_reach_timm(name):
    model = timm.create_model(name, num_classes=7, depth=2, img_size=12)
    assert len(model.blocks) == 2
    assert model(torch.zeros(1, 1, 12, 12)).shape == (1, 7)


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_is_an_error_that_says_so(name):
    with pytest.raises(ValueError, match=r"pretrained=True.*no published weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", MODELS)
def test_timm_knows_its_input(name):
    assert timm.get_pretrained_cfg(name).input_size == (1, 8, 8)

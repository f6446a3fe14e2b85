"""The vision encoders of Qwen3 and DeepSeek inside timm's classifiers."""

import copy

import pytest
import torch
from oracle import absent, error, gradient_error, gradients, stored
from torch import nn

import uvc
from uvc.costs import count_macs
from uvc.layers import timm_classes
from uvc.structure import Structure

SIZES = dict(img_size=(16, 24), patch_size=4, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.25)
CLASSES = {
    "qwen3 classifier": ("qwen3_vit", "Qwen3VitClassifier", dict(num_classes=5)),
    "deepseek classifier": ("deepseek_vit", "DeepseekVitClassifier", dict(num_classes=5)),
}


def made(name: str) -> nn.Module:
    """A small model, all its weights random, of float64."""
    file, cls, own = CLASSES[name]
    found = timm_classes(file, cls)
    if not found:
        pytest.skip(f"this timm has no {file}")
    torch.manual_seed(5)
    model = found[0](**SIZES, **own).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:UVC")
def test_an_encoder_is_pruned_compacted_counted_saved_and_loaded(name, tmp_path):
    model, x = made(name), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    before, keys = model(x), list(model.state_dict())
    structure = Structure.random(model, 0.5, seed=2)
    truth = absent(model, structure)(x)
    expected = gradients(model, truth)
    assert torch.equal(uvc.convert(copy.deepcopy(model))(x), before)
    pruned = uvc.apply_structure(copy.deepcopy(model), structure)
    assert list(pruned.state_dict()) == keys
    out = pruned(x)
    assert error(out, truth) < 1e-10 and error(out, before) > 1e-3
    assert gradient_error(gradients(pruned, out), expected) < 1e-9
    small, cost = uvc.compact(pruned), uvc.cost(pruned)
    assert error(small(x), truth) < 1e-10
    assert cost.macs == count_macs(small, x[:1])
    assert cost.params == sum(p.numel() for p in small.parameters())
    for saved in (small, pruned):
        uvc.save(saved, tmp_path)
        loaded = uvc.load(tmp_path)
        assert stored(loaded) == stored(saved)
        assert error(loaded(x), truth) < 1e-10

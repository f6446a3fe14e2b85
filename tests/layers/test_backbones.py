"""Converted and compacted models as backbones: features, other heads, other sizes, wrappers of one's own."""

import copy

import pytest
import timm
import torch
from oracle import error, small_vit
from torch import nn

import uvc
from uvc.costs import count_macs
from uvc.structure import Structure


def forms(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with half of it removed, on the fly and compacted, in evaluation."""
    pruned = uvc.apply_structure(model.eval(), Structure.random(model, 0.5, seed=1))
    return pruned, uvc.compact(pruned)


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates_are_those_of_timm_and_stay_through_compaction(output_fmt):
    plain, x = small_vit(reg_tokens=2).eval(), torch.randn(2, 3, 16, 16)
    how = dict(indices=[0, 2], output_fmt=output_fmt, norm=True, return_prefix_tokens=True)
    final, expected = plain.forward_intermediates(x, **how)
    converted = uvc.convert(copy.deepcopy(plain)).forward_intermediates(x, **how)
    for found, aim in zip(converted[1], expected, strict=True):
        assert all(map(torch.equal, found, aim))
    pruned, small = forms(copy.deepcopy(plain))
    final, expected = pruned.forward_intermediates(x, **how)
    found, maps = small.forward_intermediates(x, **how)
    assert error(found, final) < 1e-5
    for mine, aim in zip(maps, expected, strict=True):
        assert error(mine[0], aim[0]) < 1e-5 and error(mine[1], aim[1]) < 1e-5


def test_a_model_of_features_only_is_pruned_compacted_and_counted():
    sizes = dict(img_size=32, depth=3, embed_dim=24, num_heads=3)
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[0, 2], **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    assert all(map(torch.equal, uvc.convert(model)(x), before))
    pruned, small = forms(model)
    for mine, aim, dense in zip(small(x), pruned(x), before, strict=True):
        assert error(mine, aim) < 1e-5 and error(aim, dense) > 1e-3
    assert uvc.cost(pruned).macs == count_macs(small, x[:1])
    assert uvc.cost(pruned).params == sum(p.numel() for p in small.parameters())


def test_another_head_and_another_size_fit_what_is_pruned_and_compacted(tmp_path):
    for model in forms(small_vit(class_token=False, global_pool="avg")):
        model.reset_classifier(7)
        model.set_input_size((24, 16))
        out = model(x := torch.randn(2, 3, 24, 16))
        assert out.shape == (2, 7)
        assert uvc.cost(model).macs == count_macs(
            model if "Compact" in repr(model) else uvc.compact(model), x[:1]
        )
        uvc.save(model, tmp_path)
        assert error(uvc.load(tmp_path)(x), out) < 1e-5


def test_a_wrapper_of_ones_own_is_served_and_what_it_holds_is_saved(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = small_vit(), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.backbone(x))

    wrapper, x = Wrapper(), torch.randn(2, 3, 16, 16)
    keys = list(wrapper.state_dict())
    pruned, small = forms(wrapper)
    assert list(pruned.state_dict()) == keys
    assert error(small(x), pruned(x)) < 1e-5
    assert uvc.cost(pruned).macs == count_macs(small, x[:1])
    with pytest.raises(ValueError, match="cannot save a Wrapper"):
        uvc.save(small, tmp_path)
    uvc.save(small.backbone, tmp_path)
    assert error(uvc.load(tmp_path)(x), small.backbone(x)) < 1e-5

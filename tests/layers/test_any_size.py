"""Models for images of any size (NaFlexViT, SigLIP 2): padded patches, and the size that costs are of."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from oracle import absent, error, gradient_error, gradients, images, needs_whole_naflex, small_vit
from timm.models.naflexvit import NaFlexVit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import uvc
from uvc.config import Config
from uvc.costs import count_macs
from uvc.layers import image_of, patches_of, set_tokens
from uvc.structure import Structure

PATCH, GRIDS = 4, ((3, 4), (2, 5))  # the second image has 10 patches, which two of padding follow


def made(**changes) -> NaFlexVit:
    """A small model in evaluation, all its weights random, of float64."""
    torch.manual_seed(3)
    sizes = dict(patch_size=PATCH, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5, num_classes=5)
    model = NaFlexVit(**{**sizes, "pos_embed_grid_size": (4, 4), **changes}).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def batch() -> dict[str, Tensor]:
    """Two images of different grids, as patches, where they are, and which are none."""
    torch.manual_seed(4)
    longest = max(h * w for h, w in GRIDS)
    found = {
        "patches": torch.randn(2, longest, PATCH * PATCH * 3, dtype=torch.float64),
        "patch_coord": torch.zeros(2, longest, 2, dtype=torch.int64),
        "patch_valid": torch.zeros(2, longest, dtype=torch.bool),
    }
    for i, (h, w) in enumerate(GRIDS):
        found["patch_coord"][i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        found["patch_valid"][i, : h * w] = True
    return found


KINDS = {
    "learned positions, map pool": {},
    "class token": dict(class_token=True, global_pool="token", reg_tokens=1),
    "keys alone are masked": dict(use_key_only_attn_mask=True, global_pool="avg"),
    "rotary positions": dict(rope_type="axial", pos_embed="none", global_pool="avg"),
    "rotary positions of each head": dict(rope_type="mixed", embed_dim=48, global_pool="avg"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:UVC")
def test_padded_patches_stay_masked_in_what_is_pruned_and_compacted(name):
    model, x = made(**KINDS[name]), batch()
    try:
        before = model(x)
    except TypeError as error_of_timm:
        pytest.skip(f"this timm cannot run it: {str(error_of_timm).splitlines()[0]}")
    assert torch.equal(uvc.convert(copy.deepcopy(model))(x), before)
    structure = Structure.random(model, 0.5, seed=2)
    truth = absent(model, structure)(x)
    expected = gradients(model, truth)
    pruned = uvc.apply_structure(copy.deepcopy(model), structure)
    out = pruned(x)
    assert error(out, truth) < 1e-10 and error(out, before) > 1e-3
    assert gradient_error(gradients(pruned, out), expected) < 1e-9
    small = uvc.compact(pruned)
    assert error(small(x), truth) < 1e-10
    other = {**x, "patches": x["patches"].masked_fill(~x["patch_valid"][..., None], 7.0)}
    assert torch.equal(pruned(other), out)
    assert torch.equal(small(other), small(x))


def test_costs_are_those_of_the_size_that_a_model_was_pretrained_at_unless_another_is_stated(tmp_path):
    needs_whole_naflex()
    model = timm.create_model("naflexvit_base_patch16_siglip", depth=1, embed_dim=24, num_heads=3)
    assert image_of(model) == (3, 384, 384) and patches_of(model) == 576
    whole = uvc.cost(model).macs
    set_tokens(model, 60)
    assert image_of(model) == (3, 6 * 16, 10 * 16) and patches_of(model) == 60
    assert uvc.cost(model).macs == count_macs(model, images(model)[:1]) < whole
    uvc.save(model, tmp_path)
    assert uvc.cost(uvc.load(tmp_path)) == uvc.cost(model)


def test_a_model_without_a_pretrained_size_counts_its_grid_of_positions():
    assert image_of(made()) == (3, 16, 16)
    assert patches_of(set_tokens(made(), 7)) == 7


def test_costs_of_sam_2_are_those_of_a_stated_square():
    model = timm.create_model("sam2_hiera_tiny", embed_dim=8, stages=(1, 1, 1, 1), global_att_blocks=(2,))
    assert image_of(model) == (3, 896, 896) and patches_of(model) == 224**2
    set_tokens(model, 32**2)
    assert image_of(model) == (3, 128, 128)
    assert uvc.cost(model).macs == count_macs(uvc.compact(uvc.convert(model)), images(model)[:1])
    with pytest.raises(ValueError, match="a HieraDet's cost is that of square images, but 384 tokens are no"):
        uvc.cost(set_tokens(model, 384))


def test_tokens_of_a_model_for_images_of_one_size_are_its_own():
    model = small_vit()
    assert set_tokens(model, 16) is model
    with pytest.raises(ValueError, match=r"tokens_per_image: 17, but the .* one size, which are 16 tokens"):
        set_tokens(model, 17)
    with pytest.raises(ValueError, match="tokens_per_image: 0; give a number of patch tokens"):
        set_tokens(made(), 0)


def test_a_budget_is_met_at_the_tokens_that_are_stated():
    model = made().float()
    data = TensorDataset(torch.randn(8, 3, 8, 12), torch.randint(5, (8,)))
    loader = DataLoader(data, batch_size=4)
    config = replace(Config(), warmup_epochs=0, search_epochs=2, post_epochs=1)
    result = uvc.compress(model, loader, loader, budget=0.6, config=config, tokens_per_image=6)
    assert image_of(result.model) == (3, 8, 12)
    assert 0.5 < result.cost.macs / result.dense_cost.macs <= 0.6
    assert count_macs(uvc.compact(result.model), data[:1][0]) == result.cost.macs

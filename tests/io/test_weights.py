"""Weights as people have them: read, unwrapped and resampled."""

import argparse
import json
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from weights_of_others import CLOSE, images, lively, quietly, same, vit

import uvc

# What training programs make of a state_dict.
WRAPS = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "epoch": 3, "args": argparse.Namespace(lr=0.1, model="vit")},
    "state_dict": lambda w: {"state_dict": w, "arch": "vit", "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda w: {"model_state_dict": w, "loss": torch.tensor(0.3)},
    "nested": lambda w: {"model": {"state_dict": OrderedDict(w)}},
    "data parallel": lambda w: {f"module.{k}": v for k, v in w.items()},
    "compiled": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "compiled in data parallel": lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
    "data parallel in compiled, wrapped": lambda w: {
        "state_dict": {f"_orig_mod.module.{k}": v for k, v in w.items()}
    },
    "backbone with the head beside it": lambda w: {
        k if k.startswith("head") else f"module.backbone.{k}": v for k, v in w.items()
    },
    "encoder": lambda w: {f"encoder.{k}": v for k, v in w.items()},
    "lightning": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "global_step": 7},
    "a part of a model and one stray prefix": lambda w: {
        f"module.{k}" if k == "head.bias" else k: v for k, v in w.items()
    },
}


@pytest.mark.parametrize("converted", [False, True], ids=["timm", "converted"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_stands_around_weights_is_taken_off(wrap, converted, tmp_path):
    weights = vit(seed=1).state_dict()
    torch.save(WRAPS[wrap](weights), tmp_path / "w.pth")
    model = vit(seed=2)
    model = uvc.convert(model) if converted else model
    assert same(quietly(model, tmp_path / "w.pth"), weights)


@pytest.mark.parametrize("file", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.safetensors", "old.pth", "w.txt"])
def test_a_file_is_told_by_its_bytes_and_not_by_its_name(file, tmp_path):
    weights = vit(seed=1).state_dict()
    if file.endswith("safetensors"):
        save_file(weights, tmp_path / file)
    else:
        new = not file.startswith("old")
        torch.save(weights, tmp_path / file, _use_new_zipfile_serialization=new)
    assert same(quietly(vit(seed=2), str(tmp_path / file)), weights)


def make_folder(kind, model, folder):
    weights = model.state_dict()
    if kind == "uvc.save":
        uvc.save(model, folder)
        return
    folder.mkdir()
    if kind == "model.safetensors":
        save_file(weights, folder / kind)
    elif kind == "pytorch_model.bin":
        torch.save(weights, folder / kind)
    else:
        halves = list(weights)[::2], list(weights)[1::2]
        names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            save_file({key: weights[key] for key in half}, folder / name)
        where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize(
    "kind", ["uvc.save", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_a_folder_is_as_good_as_its_file(kind, tmp_path):
    saved = vit(seed=1)
    make_folder(kind, saved, tmp_path / "folder")
    assert same(quietly(vit(seed=2), tmp_path / "folder"), saved.state_dict())


@pytest.mark.parametrize("name", ["uvc_vit_digits", "uvc_vit_digits_distilled", "t2t_vit_14"])
def test_models_of_this_library_load_too(name, tmp_path):
    sizes = {"depth": 1} if "t2t" in name else {}
    saved = lively(timm.create_model(name, **sizes))
    torch.save({"state_dict_ema": {f"module.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "w")
    assert same(quietly(timm.create_model(name, **sizes), tmp_path / "w"), saved.state_dict())


def test_a_compacted_and_a_pruned_model_take_their_own_weights_back(tmp_path):
    model = uvc.convert(vit(seed=1))
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=1))
    for saved in (model, uvc.compact(model)):
        uvc.save(saved, tmp_path / type(saved.blocks[0]).__name__)
        other = lively(uvc.load(tmp_path / type(saved.blocks[0]).__name__), seed=3)
        assert same(quietly(other, tmp_path / type(saved.blocks[0]).__name__), saved.state_dict())
        with pytest.raises(ValueError, match=r"pruned model.*uvc\.load"):
            uvc.load_weights(vit(), tmp_path / type(saved.blocks[0]).__name__)


def test_a_compiled_or_wrapped_model_takes_weights(tmp_path):
    weights = vit(seed=1).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    model = vit(seed=2)
    quietly(nn.DataParallel(torch.compile(model)), tmp_path / "w.safetensors")
    assert same(model, weights)


def test_a_model_without_memory_gets_its_weights_and_not_views_of_the_file(tmp_path):
    weights = vit(seed=1).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    with torch.device("meta"):
        model = vit()
    quietly(model, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(bytes((tmp_path / "w.pth").stat().st_size))
    assert same(model, weights)


@pytest.mark.parametrize("its", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mine", [torch.float32, torch.bfloat16], ids=str)
def test_weights_become_the_models_dtype(its, mine, tmp_path):
    weights = {name: t.to(its) for name, t in vit(seed=1).state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = quietly(vit(seed=2).to(mine), tmp_path / "w.safetensors")
    assert same(model, {name: t.to(mine) for name, t in weights.items()})


@pytest.mark.parametrize("size", [48, (16, 48)], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_positions_are_resampled_by_timm_to_the_size_of_the_model_and_it_is_said(name, size, tmp_path):
    saved = vit(name, seed=1)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = vit(name, img_size=size)
    with pytest.warns(UserWarning, match="adapted by timm: pos_embed"):
        assert uvc.load_weights(model, tmp_path / "w.pth") == ()
    grid, tokens = model.patch_embed.grid_size, model.num_prefix_tokens
    expected = resample_abs_pos_embed(saved.pos_embed.detach(), grid, num_prefix_tokens=tokens)
    assert torch.equal(model.pos_embed, expected)


def test_a_saved_folder_of_wide_images_keeps_its_positions(tmp_path):
    # 2 x 8 patches are as many as 4 x 4, the grid of the square size that timm knows for this name.
    saved = vit(seed=1, img_size=(16, 64))
    saved.pretrained_cfg["input_size"] = (3, 32, 32)
    uvc.save(saved, tmp_path / "wide")
    assert same(quietly(vit(img_size=(16, 64)), tmp_path / "wide"), saved.state_dict())


def test_colour_weights_go_into_a_grey_model_as_timm_does_it(tmp_path):
    saved = vit(seed=1)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = vit(in_chans=1)
    with pytest.warns(UserWarning, match="adapted by timm: patch_embed.proj.weight"):
        uvc.load_weights(model, tmp_path / "w.pth")
    grey = images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(model(grey), saved(grey.expand(-1, 3, -1, -1)), **CLOSE)


def test_a_classifier_for_other_classes_is_left_and_said_once(tmp_path):
    saved = vit("deit_tiny_distilled_patch16_224", seed=1, num_classes=7)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = vit("deit_tiny_distilled_patch16_224")
    before = model.head.weight.clone(), model.head_dist.weight.clone()
    with pytest.warns(UserWarning) as said:
        left = uvc.load_weights(model, tmp_path / "w.pth")
    assert left == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    assert len(said) == 1 and "[7, 24], not [5, 24]" in str(said[0].message)
    assert torch.equal(model.head.weight, before[0]) and torch.equal(model.head_dist.weight, before[1])
    assert torch.equal(model.blocks[1].mlp.fc2.weight, saved.blocks[1].mlp.fc2.weight)

"""Weights of other libraries and training methods: renamed, and what is no part of the model is left."""

import argparse
import re

import pytest
import torch
from weights_of_others import CLOSE, images, lively, of_transformers, quietly, same, vit

import uvc

KINDS = ["ViT", "ViT without biases of qkv", "DeiT with its teacher's head", "DINOv2"]
KINDS += ["DINOv2 with registers", "DINOv2 giant", "ViT-MAE"]


@pytest.mark.parametrize("as_file", ["folder", "state_dict"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*not used")
def test_a_model_of_transformers_computes_the_same(kind, as_file, tmp_path):
    theirs, mine = of_transformers(kind)
    path = tmp_path / "saved"
    # The names inside a folder are those of older versions.
    theirs.save_pretrained(path) if as_file == "folder" else torch.save(theirs.state_dict(), path)
    assert uvc.load_weights(mine, path) == ()
    with torch.no_grad():
        out = theirs(images())
        logits = getattr(out, "logits", None)
        if logits is not None:
            torch.testing.assert_close(mine(images()), logits, **CLOSE)
        elif kind == "ViT-MAE":  # in an order of its own
            back = out.ids_restore[..., None].expand(-1, -1, 24)
            states = torch.cat(
                [out.last_hidden_state[:, :1], out.last_hidden_state[:, 1:].gather(1, back)], 1
            )
            torch.testing.assert_close(mine.forward_features(images()), states, **CLOSE)
        else:
            torch.testing.assert_close(mine.forward_features(images()), out.last_hidden_state, **CLOSE)


def test_a_model_of_transformers_with_other_heads_is_refused(tmp_path):
    theirs, _ = of_transformers("ViT")
    theirs.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="2 heads per block, the model 3; make the model with num_heads=2"):
        uvc.load_weights(vit(num_heads=3), tmp_path / "saved")


@pytest.mark.parametrize("older", [False, True], ids=["names of today", "names of old files"])
def test_a_model_of_torchvision_computes_the_same(older, tmp_path):
    from torchvision.models import VisionTransformer

    theirs = lively(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5))
    weights = theirs.state_dict()
    if older:
        weights = {
            re.sub(r"mlp\.([03])\.", lambda m: f"mlp.linear_{1 + int(m[1]) // 3}.", name): value
            for name, value in weights.items()
        }
    torch.save(weights, tmp_path / "vit.pth")
    mine = quietly(vit(), tmp_path / "vit.pth")
    with torch.no_grad():
        torch.testing.assert_close(mine(images()), theirs(images()), **CLOSE)


def test_a_classifier_over_another_layer_is_left_and_said(tmp_path):
    from torchvision.models import VisionTransformer

    theirs = lively(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5, representation_size=24))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    with pytest.warns(UserWarning, match="head.weight, head.bias stay as they were"):
        assert uvc.load_weights(vit(), tmp_path / "vit.pth") == ("head.weight", "head.bias")


def test_a_teacher_of_dino_is_taken_and_its_projection_left(tmp_path):
    weights = vit(seed=1, num_classes=0).state_dict()
    other = vit(seed=2, num_classes=0).state_dict()
    part = {f"backbone.{name}": t for name, t in weights.items()} | {"head.mlp.0.weight": torch.ones(3, 3)}
    student = {f"module.backbone.{name}": t for name, t in other.items()}
    saved = {"student": student, "teacher": part, "epoch": 1, "args": argparse.Namespace(arch="vit")}
    torch.save(saved, tmp_path / "dino.pth")
    model = vit(seed=3)
    head = model.head.weight.clone()
    with pytest.warns(UserWarning) as said:
        assert uvc.load_weights(model, tmp_path / "dino.pth") == ("head.weight", "head.bias")
    assert len(said) == 1 and "the file has none" in str(said[0].message)
    assert "not used: 1 (head.mlp.0.weight)" in str(said[0].message)
    assert torch.equal(model.head.weight, head)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in weights.items())


def test_of_student_and_teacher_in_one_dict_the_teacher_is_taken(tmp_path):
    teacher, student = (vit(seed=i, num_classes=0).state_dict() for i in (1, 2))
    both = {f"student.backbone.{name}": t for name, t in student.items()}
    both |= {f"teacher.backbone.{name}": t for name, t in teacher.items()}
    torch.save({"model": both | {"teacher.dino_head.w": torch.ones(2)}}, tmp_path / "w.pth")
    model = vit(num_classes=0)
    with pytest.warns(UserWarning, match="not used"):
        uvc.load_weights(model, tmp_path / "w.pth")
    assert same(model, teacher)


def test_averaged_weights_come_before_the_last_ones_and_it_is_said(tmp_path):
    mean, last = vit(seed=1).state_dict(), vit(seed=2).state_dict()
    torch.save({"model": last, "model_ema": mean}, tmp_path / "w.pth")
    model = vit()
    with pytest.warns(UserWarning, match="those of 'model_ema'; 'model' not used"):
        uvc.load_weights(model, tmp_path / "w.pth")
    assert same(model, mean)


def test_a_decoder_of_mae_is_not_used(tmp_path):
    weights = vit(seed=1, num_classes=0).state_dict()
    rest = {"mask_token": torch.ones(1, 1, 8), "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8)}
    rest["decoder_pos_embed"] = torch.ones(1, 17, 8)
    torch.save({"model": weights | rest}, tmp_path / "mae.pth")
    model = vit(num_classes=0)
    with pytest.warns(UserWarning, match="not used: 3 "):
        uvc.load_weights(model, tmp_path / "mae.pth")
    assert same(model, weights)


def test_layer_scale_under_the_published_names_of_deit3(tmp_path):
    saved = vit("deit3_small_patch16_224", seed=1)
    names = {n: re.sub(r"ls([12])\.gamma", r"gamma_\1", n) for n in saved.state_dict()}
    torch.save({"model": {names[n]: t for n, t in saved.state_dict().items()}}, tmp_path / "deit3.pth")
    assert same(quietly(vit("deit3_small_patch16_224"), tmp_path / "deit3.pth"), saved.state_dict())

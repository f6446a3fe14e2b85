"""Recipes: complete configs; those for ImageNet name a model, a budget, and what was published."""

import pytest
import timm
import torch

import uvc.models  # noqa: F401  registers T2T-ViT
from uvc import cli
from uvc.constraints import limits
from uvc.recipes import AIMS, RECIPES


def test_recipes_for_imagenet_are_all_there():
    assert set(AIMS) == {"deit_tiny_50", "deit_small_50", "deit_small_58", "deit_base_45", "t2t_vit_14_50"}
    assert set(AIMS) < set(RECIPES)


@pytest.mark.parametrize("name", AIMS)
def test_a_recipe_trains_as_the_paper_does(name):
    config = RECIPES[name]()
    assert (config.warmup_epochs, config.search_epochs) == (5, 25) and 120 <= config.post_epochs <= 150
    assert (config.mixup, config.cutmix, config.label_smoothing) == (0.8, 1.0, 0.1)
    assert config.precision == "bfloat16" and config.ema_decay > 0.999 and config.distill.kind == "soft"


@pytest.mark.parametrize("name", AIMS)
def test_a_recipes_model_can_meet_its_budget_and_costs_what_was_published(name):
    aim = AIMS[name]
    with torch.device("meta"):
        model = timm.create_model(aim.model)
    (limit,) = limits(model, aim.budget)
    gmacs = [
        float(word) for word in aim.published.replace("GMACs", " ").split() if word.replace(".", "").isdigit()
    ]
    if name in ("deit_small_50", "deit_small_58", "deit_base_45"):
        assert limit.dense / 1e9 == pytest.approx(gmacs[0], rel=0.01)
        # The budget never exceeds what the published result cost.
        assert 0.98 * gmacs[1] < limit.most / 1e9 < 1.005 * gmacs[1]


def test_a_recipe_for_imagenet_wants_its_data(tmp_path, capsys):
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--recipe", "deit_small_50"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--data" in shown and "deit_small_50" in shown


def test_a_recipe_sets_model_and_budget_when_none_are_given(tmp_path, capsys, monkeypatch):
    asked = {}

    def stop(model, *_):
        asked["blocks"], asked["width"] = len(model.blocks), model.embed_dim
        raise KeyboardInterrupt

    monkeypatch.setattr("uvc.app.pipeline._make_teacher", stop)
    options = ["--recipe", "deit_tiny_50", "--data", "digits", "--out"]
    assert cli.run(["compress", *options, str(tmp_path / "a")]) == 130
    assert asked == {"blocks": 12, "width": 192}
    shown = capsys.readouterr().err
    assert "published by others, not ours: DeiT-T 72.2%" in shown and "reachable macs" in shown
    assert cli.run(["compress", *options, str(tmp_path / "b"), "--model", "uvc_vit_digits"]) == 130
    assert asked["width"] == timm.create_model("uvc_vit_digits").embed_dim
    assert "published" not in capsys.readouterr().err

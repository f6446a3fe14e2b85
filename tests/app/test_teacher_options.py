"""--teacher, --pretrained and --freeze: taken before any training, or one line and nothing is written."""

import json

import pytest
import timm.models._builder
import torch
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

import uvc
from uvc import cli
from uvc.app import pipeline
from uvc.app.resolve import resolve

_CFG = dict(input_size=(1, 8, 8), hf_hub_id="nobody/", classifier="head", first_conv="patch_embed.proj")
default_cfgs = generate_default_cfgs(
    {
        "uvc_test_hub_vit": dict(_CFG, num_classes=10),
        "uvc_test_hub_vit_wide": dict(_CFG, num_classes=1000),
    }
)


def _build(name, pretrained, options):
    sizes = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=24, depth=2, num_heads=2)
    return build_model_with_cfg(VisionTransformer, name, pretrained, **{**sizes, **options})


@register_model
def uvc_test_hub_vit(pretrained=False, **options):
    """A small ViT whose weights are on timm's hub."""
    return _build("uvc_test_hub_vit", pretrained, options)


@register_model
def uvc_test_hub_vit_wide(pretrained=False, **options):
    """The same for a thousand classes."""
    return _build("uvc_test_hub_vit_wide", pretrained, options)


RUN = ["--model", "uvc_test_hub_vit", "--batch-size", "216", "--quiet"]
RUN += "--teacher-epochs 1 --warmup-epochs 0 --search-epochs 2 --post-epochs 0".split()


@pytest.fixture
def hub(monkeypatch):
    """Weights that a hub in memory hands out, for as many classes as asked."""

    def serve(num_classes=10):
        torch.manual_seed(7)
        weights = timm.create_model("uvc_test_hub_vit", num_classes=num_classes).state_dict()
        monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(weights))
        return weights

    return serve


def phases(out):
    return {json.loads(line).get("phase") for line in (out / "log.jsonl").read_text().splitlines()}


def test_timms_own_weights_are_the_teacher(hub, tmp_path, monkeypatch):
    weights = hub()
    assert cli.run(["compress", "--out", str(tmp_path / "run"), "--pretrained", *RUN]) == 0
    kept = load_file(tmp_path / "run" / "teacher" / "model.safetensors")
    assert kept.keys() == weights.keys() and all(torch.equal(kept[name], weights[name]) for name in kept)
    assert "teacher" not in phases(tmp_path / "run")
    # What was begun goes on where no hub is.
    unreachable(monkeypatch)
    (tmp_path / "run" / "summary.json").unlink()
    assert cli.run(["compress", "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 0


def test_timms_own_weights_for_other_classes_are_trained_first(hub, tmp_path, monkeypatch):
    weights, seen = hub(1000), {}

    def train(model, *_):
        seen.update({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(pipeline, "train_teacher", train)
    options = [*RUN, "--pretrained", "--model", "uvc_test_hub_vit_wide"]
    assert cli.run(["compress", "--out", str(tmp_path / "run"), *options]) == 0
    assert seen["head.weight"].shape == (10, 24)
    assert all(torch.equal(seen[name], weights[name]) for name in weights if not name.startswith("head."))


def unreachable(monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fail)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            [],
            "can be had (We couldn't connect to the hub); give a file of weights, --teacher FILE",
        ),
        (["--model", "uvc_vit_digits"], "no weights of uvc_vit_digits can be had (pretrained=True: "),
        (["--teacher", "w.pth"], "leave one of them out"),
    ],
    ids=["no hub", "a model without weights", "two teachers"],
)
def test_where_timms_weights_cannot_be_had_one_line_says_so(options, says, tmp_path, capsys, monkeypatch):
    unreachable(monkeypatch)
    assert cli.run(["compress", "--out", str(tmp_path / "run"), "--pretrained", *RUN, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("uvc: --pretrained: ") and says in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_no_time_for_a_new_classifier_is_refused_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    unreachable(monkeypatch)
    options = [*RUN, "--pretrained", "--model", "uvc_test_hub_vit_wide", "--teacher-epochs", "0"]
    assert cli.run(["compress", "--out", str(tmp_path / "run"), *options]) == 2
    assert "is for 1000 classes, not 10" in capsys.readouterr().err


def test_weights_that_a_hub_gives_may_not_be_nan(hub, tmp_path, capsys):
    hub()["norm.bias"][3] = torch.nan
    assert cli.run(["compress", "--out", str(tmp_path / "run"), "--pretrained", *RUN]) == 2
    said = capsys.readouterr().err
    assert "norm.bias" in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_frozen_parts_of_a_run_are_those_of_the_teacher(hub, tmp_path):
    save_file(hub(), tmp_path / "w.safetensors")
    file = tmp_path / "run.toml"
    file.write_text('freeze = ["patch_embed", "blocks.1.mlp"]')
    options = [*RUN, "--teacher", str(tmp_path / "w.safetensors"), "--config", str(file), "--budget", "0.7"]
    assert cli.run(["compress", "--out", str(tmp_path / "run"), *options]) == 0
    small, weights = uvc.load(tmp_path / "run"), hub()
    assert torch.equal(small.patch_embed.proj.weight, weights["patch_embed.proj.weight"])
    assert torch.equal(small.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(small.norm.weight, weights["norm.weight"])


def test_patterns_may_be_repeated_and_go_over_those_of_a_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('freeze = ["pos_embed"]')
    assert resolve({}, file).training.freeze == ("pos_embed",)
    assert resolve({"freeze": ("head", "*.norm1")}, file).training.freeze == ("head", "*.norm1")
    assert resolve({}).training.freeze == ()


def test_a_pattern_without_a_match_is_one_line_and_nothing_is_written(tmp_path, capsys):
    options = [*RUN, "--freeze", "head", "--freeze", "blcoks.0"]
    assert cli.run(["compress", "--out", str(tmp_path / "run"), *options]) == 2
    said = capsys.readouterr().err
    assert "freeze: 'blcoks.0' matches no" in said and "blocks.0" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()

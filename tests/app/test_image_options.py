"""Options of images, as timm spells them, and of the teacher's answers reach a run and `uvc eval`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import needs_whole_naflex
from PIL import Image

from uvc.app import start
from uvc.app.options import join_numbers
from uvc.cli import run
from uvc.config import RunConfig
from uvc.layers import image_of

SHORT = ["--model", "uvc_vit_digits", "--batch-size", "4", "--teacher-epochs", "1", "--warmup-epochs", "0"]
SHORT += ["--search-epochs", "2", "--post-epochs", "1", "--quiet", "--threads", "1"]


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = random.integers(60 * label, 60 * label + 100, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--mean 0.5 0.4 0.3 --data x", "--mean 0.5,0.4,0.3 --data x"),
        ("--input-size 3 84 84 --seed 3", "--input-size 3,84,84 --seed 3"),
        ("--std 1e-1 2 DIR", "--std 1e-1,2 DIR"),
        ("--mean 0.5,0.4,0.3 --std 0.1", "--mean 0.5,0.4,0.3 --std 0.1"),
        ("--seed 3 4", "--seed 3 4"),
    ],
)
def test_several_numbers_may_stand_apart(typed, meant):
    assert join_numbers(typed.split()) == meant.split()


def test_a_run_takes_size_and_view_and_evaluates_so(folder, capsys):
    options = ["--data", str(folder / "data"), *SHORT, "--teacher-cache", str(folder / "cache")]
    options += [
        "--input-size",
        "3",
        "12",
        "12",
        "--mean",
        "0.4",
        "0.5",
        "0.6",
        "--std",
        "0.3",
        "--reprob",
        "0.2",
    ]
    assert run(["compress", "--out", str(folder / "run"), *options]) == 0
    saved = json.loads((folder / "run" / "run.json").read_text())
    assert saved["images"]["input_size"] == [3, 12, 12] and saved["images"]["mean"] == [0.4, 0.5, 0.6]
    assert len(list((folder / "cache").glob("epoch-*.safetensors"))) == 3
    summary = json.loads((folder / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert run(["eval", str(folder / "run")]) == 0
    assert f"top-1 {summary['final_top1']:.2f} %  of 12 images" in capsys.readouterr().out
    # The data root of a data set that timm names is remembered, and no other budget's answers are in the way.
    options[1:2] = ["torch/image_folder", "--data-root", str(folder / "data")]
    assert run(["compress", "--out", str(folder / "other"), *options, "--budget", "0.7"]) == 0
    assert run(["eval", str(folder / "other")]) == 0
    assert "of 12 images of torch/image_folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mean", "0.4", "0.5"], "mean: (0.4, 0.5) are 2 numbers; images have 3 channels"),
        (["--mean", "light"], "--mean: 'light'; give numbers, as in 0.485,0.456,0.406"),
        (["--input-size", "3", "12"], "--input-size: [3, 12]; it must be a list of 3 values"),
        (["--reprob", "2"], "--reprob: 2.0; it must be in [0, 1]"),
        (["--crop-pct", "0"], "--crop-pct: 0.0; it must be a positive number"),
        (["--interpolation", "cubic"], "interpolation: 'cubic'; use one of"),
        (["--model-arg", "img_size=8"], "--input-size: (3, 12, 12), but --model-arg says otherwise"),
        (["--distill", "none", "--teacher-cache", "cache"], "needs a teacher, but distill kind is 'none'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_one_line_and_nothing_is_begun(folder, capsys, options, says):
    start = ["compress", "--out", str(folder / "run"), "--data", str(folder / "data"), *SHORT]
    assert run([*start, "--input-size", "3", "12", "12", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.strip().splitlines()) == 1 and not (folder / "run").exists()


def test_a_model_for_images_of_any_size_is_run_and_counted_at_the_tokens_that_are_stated(folder, capsys):
    needs_whole_naflex()
    sizes = [f"--model-arg={size}" for size in ("patch_size=4", "embed_dim=24", "num_heads=3", "depth=2")]
    start = ["compress", "--data", str(folder / "data"), *SHORT, *sizes, "--budget", "0.7"]
    start += ["--model", "naflexvit_base_patch16_siglip", "--tokens-per-image", "6"]
    assert run([*start, "--out", str(folder / "run")]) == 0
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["preprocessing"]["input_size"] == [3, 8, 12]
    assert json.loads((folder / "run" / "run.json").read_text())["images"]["tokens_per_image"] == 6
    assert run(["eval", str(folder / "run")]) == 0
    assert run([*start, "--input-size", "3,8,8", "--out", str(folder / "other")]) == 2
    assert "--tokens-per-image: --input-size says how many there are" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sam2_hiera_tiny", "naflexvit_base_patch16_siglip", "vit_tiny_patch16_224"])
def test_a_model_is_counted_at_the_input_size_that_is_stated(name):
    images = replace(RunConfig().images, input_size=(3, 160, 160))
    with torch.device("meta"):
        model = start.model_of(RunConfig(model=name, images=images), 5)
    assert image_of(model) == (3, 160, 160)

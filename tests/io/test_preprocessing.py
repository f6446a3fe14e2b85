"""A saved model says how its images are prepared and what its classes are called, and both are held to."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from oracle import small_vit
from PIL import Image
from timm.data import resolve_model_data_config

import uvc
from uvc.cli import run
from uvc.io.preprocessing import note_data
from uvc.io.serialization import CONFIG, describe, rebuild

NAMES = ("ant", "bee", "cat", "dog", "eel")
GIVEN = dict(
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    crop_pct=0.77,
    crop_mode="squash",
    interpolation="lanczos",
    label_names=NAMES,
    license="mit",
)


def model_with(**cfg) -> torch.nn.Module:
    model = small_vit()
    model.pretrained_cfg = cfg
    return model


STATES = {
    "timm's": lambda m: m,
    "converted": uvc.convert,
    "pruned": lambda m: uvc.apply_structure(m, uvc.Structure.random(m, 0.5)),
    "compacted": lambda m: uvc.compact(uvc.apply_structure(m, uvc.Structure.random(m, 0.5))),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_dinov2"]
)
def test_timm_finds_the_same_preprocessing_after_a_round_trip(name, state, tmp_path):
    model = timm.create_model(name, depth=1, num_classes=3)
    expected = resolve_model_data_config(model)
    uvc.save(STATES[state](model), tmp_path)
    uvc.save(uvc.load(tmp_path), tmp_path)
    assert resolve_model_data_config(uvc.load(tmp_path)) == expected


@pytest.mark.parametrize("state", STATES)
def test_every_field_that_timm_reads_comes_back_and_the_size_is_the_models_own(state, tmp_path):
    uvc.save(STATES[state](model_with(**GIVEN, input_size=(3, 224, 224), tag="in1k")), tmp_path)
    loaded = uvc.load(tmp_path)
    assert loaded.pretrained_cfg == {**GIVEN, "input_size": (3, 16, 16)} == loaded.default_cfg
    found = resolve_model_data_config(loaded)
    said = {name: value for name, value in GIVEN.items() if name not in ("label_names", "license")}
    assert {name: found[name] for name in said} == said


def test_a_hybrid_model_keeps_what_timm_knows_besides(tmp_path):
    model = timm.create_model("vit_tiny_r_s16_p8_224", depth=1, num_classes=5)
    note_data(model, {"mean": (0.3,) * 3}, NAMES)
    uvc.save(model, tmp_path)
    cfg = uvc.load(tmp_path).pretrained_cfg
    assert cfg["architecture"] == "vit_tiny_r_s16_p8_224" and cfg["label_names"] == NAMES
    assert cfg["mean"] == (0.3,) * 3


def test_a_model_that_says_nothing_comes_back_saying_nothing(tmp_path):
    uvc.save(small_vit(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["preprocessing"] is None
    assert not hasattr(uvc.load(tmp_path), "pretrained_cfg")


def test_names_of_another_head_are_left_out_and_said(tmp_path):
    with pytest.warns(UserWarning, match="label_names are 2, the model has 5 classes; they are not saved"):
        uvc.save(model_with(mean=(0.5,) * 3, label_names=("a", "b")), tmp_path)
    assert "label_names" not in uvc.load(tmp_path).pretrained_cfg


BAD = {
    "mean": [(), ("a",), (float("nan"),), 0.5, (True,)],
    "std": [(0.0,), (-1.0, 1.0, 1.0), (float("inf"),)],
    "crop_pct": [0, -0.5, "0.9", float("nan"), True],
    "crop_mode": ["middle", 3, ["center"]],
    "interpolation": ["cubic", 2],
    "license": ["", 3, "l" * 101],
    "label_names": [("a", "b", "c", "d", 5), "abcde", ("a", "b", "c", "d", "e" * 1001)],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in BAD for value in BAD[field]], ids=str
)
def test_a_value_that_timm_could_not_use_is_neither_saved_nor_loaded(field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot save: pretrained_cfg: {field} must be") as caught:
        uvc.save(model_with(**{field: value}), tmp_path)
    assert "\n" not in str(caught.value)
    config = describe(model_with(**GIVEN))
    config["preprocessing"][field] = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=field):
        rebuild(config)


@pytest.mark.parametrize(
    "preprocessing",
    [[], "x", {"code": 1}, {**GIVEN, "hf_hub_id": "a/b"}, {"label_names": ["a"]}, {"input_size": [3, 16]}],
    ids=str,
)
def test_a_config_with_foreign_preprocessing_is_refused(preprocessing):
    config = {**describe(small_vit()), "preprocessing": preprocessing}
    with pytest.raises(ValueError, match=r"must be|label_names are 1 for 5"):
        rebuild(json.loads(json.dumps(config)))


def test_a_folder_of_an_older_format_still_loads():
    config = {**describe(small_vit()), "format": "uvc-2"}
    del config["preprocessing"]
    _, model = rebuild(config)
    assert not hasattr(model, "pretrained_cfg")


def image_folder(root, names=("ant", "bee")):
    for split in ("train", "val"):
        for c, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            image = np.full((16, 16, 3), 60 + 120 * c, dtype=np.uint8)
            Image.fromarray(image).save(root / split / name / "0.png")
    return root


def with_names(tmp_path, names: tuple[str, ...] | None):
    """A model of two classes on disk, whose images keep their values: mean 0, std 1."""
    model = small_vit(num_classes=2, depth=1)
    note_data(model, {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}, names)
    uvc.save(uvc.compact(uvc.convert(model)), tmp_path)
    return tmp_path


def test_eval_prepares_images_as_the_model_was_trained(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "uvc.app.evaluating.count_right", lambda model, loader, device: (seen.extend(loader), (1, 2))[1]
    )
    data = image_folder(tmp_path / "data")
    assert run(["eval", str(with_names(tmp_path / "run", ("ant", "bee"))), "--data", str(data)]) == 0
    images = torch.cat([images for images, _ in seen])
    assert torch.allclose(images.mean((1, 2, 3)), torch.tensor([60 / 255, 180 / 255]), atol=1e-6)


def test_eval_refuses_data_whose_classes_have_other_names_and_takes_a_model_without_names(tmp_path, capsys):
    data = image_folder(tmp_path / "data")
    folder = with_names(tmp_path / "run", ("ant", "wasp"))
    assert run(["eval", str(folder), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "class 1 is 'bee' there but 'wasp' in the model" in error and error.count("\n") == 1
    assert run(["eval", str(with_names(tmp_path / "other", None)), "--data", str(data)]) == 0


def test_digits_know_their_normalisation_and_their_names():
    from uvc.training.data import DIGITS_MEAN, DIGITS_STD, load_data

    data = load_data("digits", model_input=(1, 8, 8), batch_size=500)
    assert data.classes == tuple("0123456789")
    assert data.view["mean"] == (DIGITS_MEAN,) and data.view["std"] == (DIGITS_STD,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model("uvc_vit_digits")
    note_data(model, data.view, data.classes)
    assert resolve_model_data_config(model)["mean"] == (DIGITS_MEAN,)

"""uvc export: every format is read back, equal, and free in its batch size; bad input is one line."""

import importlib.util

import pytest
import timm
import torch
from oracle import TOLERANCE, stored
from oracle import error as error_of

import uvc
from uvc.cli import run
from uvc.io.export import export
from uvc.io.serialization import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A compacted ViT with ragged heads, a half without neurons and a skipped half, on disk."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, num_classes=10)
    uvc.apply_structure(model, uvc.Structure.random(model, keep=0.5, seed=0))
    model.blocks[1].set_skip(True, False)
    model.blocks[2].mlp.set_kept(torch.zeros(192, dtype=torch.bool))
    path = tmp_path_factory.mktemp("run")
    uvc.save(uvc.compact(model), path)
    return path


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32)


def test_an_exported_program_takes_any_batch_and_computes_the_same(folder, images, tmp_path):
    target, error = export(folder, "torch-export", tmp_path / "model.pt2")
    assert error < 1e-5
    found = torch.export.load(target).module()(images)
    torch.testing.assert_close(found, load(folder).eval()(images), rtol=1e-4, atol=1e-5)


def test_safetensors_go_to_a_folder_that_uvc_loads(folder, images, tmp_path):
    target, error = export(folder, "safetensors", tmp_path / "model")
    assert error == 0 and sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    first, second = load(folder).eval(), uvc.load(target).eval()
    assert stored(first) == stored(second)
    assert error_of(second(images), first(images)) < TOLERANCE[images.dtype]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the onnx packages are not installed",
)
def test_an_onnx_program_takes_any_batch_and_computes_the_same(folder, images, tmp_path):
    import onnxruntime

    target, error = export(folder, "onnx", tmp_path / "model.onnx")
    assert error < 1e-4
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), load(folder).eval()(images), rtol=1e-3, atol=1e-4)


def test_the_command_names_the_file_it_wrote(folder, capsys):
    assert run(["export", str(folder), "--format", "torch-export"]) == 0
    assert str(folder / "export" / "model.pt2") in capsys.readouterr().out
    assert (folder / "export" / "model.pt2").is_file()


def test_a_program_that_differs_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("uvc.io.export.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was kept"):
        export(folder, "torch-export", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format: 'tflite'; use one of safetensors, onnx, torch-export"),
        (["--format", "torch-export", "--to", "/proc/none/model.pt2"], "--to: '/proc/none/model.pt2'"),
    ],
    ids=["format", "place"],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, folder, capsys):
    assert run(["export", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_package_is_named_with_its_remedy(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match="needs the package 'onnx'; pip install onnx"):
        export(folder, "onnx", tmp_path / "model.onnx")

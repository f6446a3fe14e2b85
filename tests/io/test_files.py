"""Every file of a run is written whole or not at all, also where the disk is full."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch

import uvc
import uvc.models
from uvc.app.summary import draw_structure
from uvc.io.files import write_json, write_tensors, write_text
from uvc.training.checkpoint import save_run

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def draw(folder: Path, model: torch.nn.Module) -> None:
    dense = uvc.Structure.dense(model)
    draw_structure(dense, dense, folder / "structure.png", "all is kept")


# What each writes, and the file.
WRITERS = {
    "a model": (lambda d, m: uvc.save(m, d), "model.safetensors"),
    "a checkpoint": (lambda d, m: save_run(d / "run", {"model": m.state_dict()}, {"step": 1}), "run"),
    "a picture": (draw, "structure.png"),
    "a text": (lambda d, m: write_text(d / "table", "1" * 9999), "table"),
    "a record": (lambda d, m: write_json(d / "run.json", {"many": [1] * 9999}), "run.json"),
}


@contextmanager
def files_of_at_most(count: int):
    """Longer files fail, as they do on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", WRITERS)
def test_on_a_full_disk_the_file_before_stays_and_the_error_is_one_line(kind, tmp_path):
    write, name = WRITERS[kind]
    model = uvc.convert(timm.create_model("uvc_vit_digits", **SIZES))
    write(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before[name]) > 5000
    with pytest.raises((OSError, ValueError)) as caught, files_of_at_most(4096):
        write(tmp_path, model)
    said = str(caught.value)
    assert f"{name} cannot be written: " in said and "File too large" in said and "\n" not in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, order = tmp_path / "weights", []
    monkeypatch.setattr("os.fsync", lambda _: order.append(("synced", path.exists())))
    write_tensors(path, {"a": torch.ones(3)})
    assert order == [("synced", False)] and path.exists()


def test_folders_are_made_and_one_in_the_way_is_one_line(tmp_path):
    write_text(tmp_path / "a" / "b" / "note", "x")
    assert (tmp_path / "a" / "b" / "note").read_text() == "x"
    with pytest.raises(OSError, match="cannot be written: ") as caught:
        write_text(tmp_path / "a" / "b" / "note" / "below", "x")
    assert "\n" not in str(caught.value)

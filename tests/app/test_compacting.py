"""uvc compact: a saved model in the faster forms, put in place when it is known to be the same."""

import json

import pytest
from oracle import error, images, small_vit, stored, structures

import uvc
from uvc.app import compacting
from uvc.app.forms import Choice, Timed
from uvc.cli import run
from uvc.compaction import forms_of, in_form


@pytest.fixture
def folder(tmp_path):
    model = small_vit()
    uvc.save(uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"])), tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture(autouse=True)
def padded_is_faster(monkeypatch):
    def choose(small, batch):
        timed = Timed("padded", {"grouped": 5, "padded": 6}, {"grouped": 2.0, "padded": 1.5})
        return Choice(in_form(small, "padded"), (timed,) * 3, 50, 1234567, 9.0, 7.2, 0.8)

    monkeypatch.setattr(compacting, "choose", choose)


def test_the_folder_holds_the_model_in_its_new_form(folder, capsys):
    before, x = uvc.load(folder), images(small_vit())
    assert run(["compact", str(folder), "--for", "cpu,batch=2"]) == 0
    shown = capsys.readouterr().out
    assert "0.800 of the time" in shown and "1,234,567" in shown and "7.200" in shown
    after = uvc.load(folder)
    assert forms_of(after) == ("padded",) * 3 and uvc.cost(after) == uvc.cost(before)
    assert error(after(x), before(x)) < 1e-5
    found = json.loads((folder / "compact.json").read_text())
    assert found["batch"] == 2 and found["forms"] == ["padded"] * 3 and found["ratio"] == 0.8
    assert found["kept_macs"] == uvc.cost(before).macs and found["blocks"][0]["ms"]["padded"] == 1.5
    written = ["README.md", "compact.json", "config.json", "model.safetensors", "structure.svg"]
    assert sorted(p.name for p in folder.iterdir()) == written


def test_out_leaves_the_folder_alone(folder, tmp_path):
    before = uvc.load(folder)
    assert run(["compact", str(folder), "--out", str(tmp_path / "b")]) == 0
    assert stored(uvc.load(folder)) == stored(before) and not (folder / "compact.json").exists()
    assert forms_of(uvc.load(tmp_path / "b")) == ("padded",) * 3


def test_a_model_that_differs_is_not_put_in_place(folder, monkeypatch, capsys):
    before = stored(uvc.load(folder))
    monkeypatch.setattr(compacting, "equivalent", lambda *models: float("nan"))
    assert run(["compact", str(folder)]) == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert stored(uvc.load(folder)) == before and len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("target", ["cpu,batch=0", "cpu,speed=2", "cpu,batch", "tpu", "cpu,batch=1,batch=2"])
def test_a_wrong_target_is_one_line(folder, target, capsys):
    assert run(["compact", str(folder), "--for", target]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_model_in_full_size_is_not_overwritten(tmp_path, capsys):
    uvc.save(small_vit(), tmp_path / "full")
    assert run(["compact", str(tmp_path / "full")]) == 2
    assert "give --out" in capsys.readouterr().err
    assert run(["compact", str(tmp_path / "full"), "--out", str(tmp_path / "b")]) == 0
    assert forms_of(uvc.load(tmp_path / "b")) == ("padded",) * 3


def test_out_that_holds_other_files_is_refused(folder, tmp_path, capsys):
    assert run(["compact", str(folder), "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err

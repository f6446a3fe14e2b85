"""A model folder for others: its card and picture, its way to a hub, and a load without the rest of uvc."""

import json
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
from hidden import hide
from oracle import small_vit, structures

import uvc
from uvc.io.card import CARD, MADE, PICTURE, Subject, write_card

SUMMARY = {
    "model": "a_vit", "data": "some|data", "device": "cpu", "teacher_top1": 97.25, "final_top1": 96.5,
    "latency": [{"batch": 1, "teacher_ms": 4.0, "compressed_ms": 2.98}], "versions": {"torch": "9.8.7"},
}  # fmt: skip


def small(**given):
    """A compacted model that says so much of its images and classes."""
    model = small_vit(num_classes=3)
    model.pretrained_cfg = model.default_cfg = given
    return uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"])).eval()


def header(text):
    """The lines between the first two rules, as names and values."""
    lines = text.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_the_card_says_licence_figures_images_and_classes_and_how_to_load_it(tmp_path):
    model = small(license="apache-2.0", mean=(0.5, 0.25, 0.125), label_names=("a*b", "dog", "<i>cat"))
    uvc.save(model, tmp_path)
    text = (tmp_path / CARD).read_text()
    assert header(text)["license"] == '"apache-2.0"' and header(text)["library_name"] == "uvc"
    now, dense = uvc.cost(model), uvc.cost(model, uvc.Structure.dense(model))
    assert f"| MACs per image | {dense.macs:,} | {now.macs:,} | {now.macs / dense.macs:.3f} |" in text
    assert f"| parameters | {dense.params:,} | {now.params:,} |" in text
    assert "[0.5, 0.25, 0.125]" in text and "a\\*b, dog, \\<i\\>cat" in text and "uvc.load(" in text
    assert "apache-2.0`, as timm says" in text and "top-1" not in text
    assert uvc.load(tmp_path).pretrained_cfg["license"] == "apache-2.0"


def test_the_picture_is_a_file_of_its_own(tmp_path):
    uvc.save(small(), tmp_path)
    root = xml.parse(tmp_path / PICTURE).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and f"]({PICTURE})" in (tmp_path / CARD).read_text()
    assert {"c0", "c1", "c2", "removed"} <= {part.get("class") for part in root.iter()}


def test_the_card_of_a_run_shows_its_figures(tmp_path):
    model = small()
    write_card(tmp_path, Subject("a_vit", model, uvc.structure_of(model), {}, SUMMARY))
    text = (tmp_path / CARD).read_text()
    assert "| top-1 on some\\|data (%) | 97.25 | 96.50 | -0.75 |" in text
    assert "| latency on cpu, batch 1 (ms) | 4.00 | 2.98 | 0.74 |" in text
    assert "torch 9.8.7" in text and header(text)["license"] == '"other"' and "not recorded; write" in text


def test_a_card_of_somebody_else_stays_and_one_of_ours_follows_the_model(tmp_path):
    uvc.save(small_vit(), tmp_path)
    first = (tmp_path / CARD).read_text()
    uvc.save(small(), tmp_path)
    assert (tmp_path / CARD).read_text() != first
    (tmp_path / CARD).write_text(first.replace(MADE, "mine"))
    uvc.save(small(), tmp_path)
    assert "mine" in (tmp_path / CARD).read_text()


LOAD = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(%r):
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
import torch, uvc
model = uvc.load(sys.argv[1])
assert model(torch.zeros(1, 3, *model.patch_embed.img_size)).isfinite().all()
print("loaded")
"""
PARTS = ("uvc.solver", "uvc.training", "uvc.app", "uvc.bench", "uvc.cli", "uvc.recipes")
PACKAGES = ("torchdata", "sklearn", "accelerate", "matplotlib", "rich", "click", "tensorboard")


def test_a_folder_loads_without_solver_data_and_command_line(tmp_path):
    uvc.save(small(), tmp_path)
    code = hide(PACKAGES) + LOAD % (PARTS,)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout == "loaded\n", run.stderr[-2000:]


class Hub:
    """What huggingface_hub would be asked for."""

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []

    def HfApi(self, token=None):
        return self

    def create_repo(self, repo, private, exist_ok):
        if self.fails:
            raise self.fails
        self.calls.append((repo, private))
        return f"https://a.hub/{repo}"

    def upload_folder(self, **options):
        self.calls.append(options)


def test_a_model_folder_goes_to_a_hub_without_checkpoints_and_logs(tmp_path, monkeypatch):
    uvc.save(small(), tmp_path)
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert uvc.push_to_hub(tmp_path, "me/mine", private=True, commit_message="m") == "https://a.hub/me/mine"
    made, sent = hub.calls
    assert made == ("me/mine", True) and sent["folder_path"] == str(tmp_path)
    assert {"model.safetensors", "config.json", CARD} <= set(sent["allow_patterns"])
    assert sent["commit_message"] == "m" and not {"log.jsonl", "*"} & set(sent["allow_patterns"])


@pytest.mark.parametrize(
    "hub, says",
    [(Hub(OSError("no\nroute")), "'me/mine': no route"), (None, "pip install huggingface_hub")],
    ids=["no network", "no package"],
)
def test_a_hub_that_is_not_there_is_one_line(hub, says, tmp_path, monkeypatch):
    uvc.save(small(), tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(ValueError, match=says):
        uvc.push_to_hub(tmp_path, "me/mine")


def test_a_damaged_folder_is_not_sent(tmp_path, monkeypatch):
    uvc.save(small(), tmp_path)
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp": "None"}))
    with pytest.raises(ValueError, match="does not describe a model"):
        uvc.push_to_hub(tmp_path, "me/mine")
    assert hub.calls == []

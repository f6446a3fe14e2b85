"""The run log, the picture of a structure, latency, and the final table."""

import json
import time
from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from uvc.app.plots import NEURON, QK, V, structure_figure
from uvc.app.summary import draw_structure, result_table
from uvc.io.files import write_json
from uvc.latency_table import measure_latency
from uvc.structure import BlockStructure, Structure
from uvc.training.logger import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_log_line_is_json_with_its_phase_and_step(tmp_path):
    with RunLog(tmp_path) as log:
        log.phase("search", 2)
        log.step(0, loss=torch.tensor(0.5), cost=1)
        log.step(1, loss=float("nan"))
        log.note(epoch=0, top1=97.5)
    assert lines(tmp_path) == [
        {"phase": "search", "step": 0, "loss": 0.5, "cost": 1},
        {"phase": "search", "step": 1, "loss": None},
        {"phase": "search", "epoch": 0, "top1": 97.5},
    ]


def test_scalars_reach_tensorboard(tmp_path):
    with RunLog(tmp_path) as log:
        log.phase("warmup", 3)
        for step in range(3):
            log.step(step, loss=0.25 * step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("warmup/loss")] == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_a_resumed_log_drops_the_torn_line_and_goes_on(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"phase": "search", "step": 0}\n{"phase": "sea')
    with RunLog(tmp_path) as log:
        log.phase("search", 2)
        log.step(1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_a_log_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as log:
        log.phase("search", 1)
        log.step(0, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_progress_is_a_plain_line_per_tenth(capsys):
    with RunLog(None, progress=True) as log:
        log.phase("search", 500)
        for step in range(0, 500, 5):
            log.step(step, loss=0.5)
        log.step(499, loss=0.25)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 10 and all(line.startswith("search") for line in shown)
    assert all(" s left" in line for line in shown)
    assert "500/500" in shown[-1] and "loss 0.25" in shown[-1]


def test_progress_shows_loss_costs_and_images_per_second_first(capsys):
    with RunLog(None, progress=True) as log:
        log.phase("search", 10)
        log.step(9, lr=1e-3, loss=0.5, target=0.6, soft_cost=0.7, hard_cost=0.8, images_s=12345.6)
    assert "loss 0.5  soft_cost 0.7  hard_cost 0.8  12,346 images/s" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"top1": 98.5})
    with pytest.raises(TypeError):
        write_json(path, {"top1": object()})
    assert json.loads(path.read_text()) == {"top1": 98.5}


def dense(blocks=3, heads=2, dims=4, neurons=12):
    kept = tuple(range(dims))
    every = (kept,) * heads
    block = BlockStructure(True, True, tuple(range(heads)), every, every, tuple(range(neurons)))
    return Structure((block,) * blocks)


RAGGED = Structure(
    (
        BlockStructure(True, True, (1,), ((0, 3),), ((1, 2, 3),), tuple(range(0, 12, 2))),
        BlockStructure(False, True, (0,), ((0,),), ((0,),), ()),
        BlockStructure(True, False, (), (), (), (4,)),
    )
)


def area(pixels, colour):
    """Fraction of the picture in one colour."""
    return (abs(pixels[..., :3] - to_rgb(colour)).max(-1) < 0.02).mean()


def test_picture_colours_what_is_kept_and_leaves_out_what_is_skipped(tmp_path):
    for name, structure in (("dense", dense()), ("ragged", RAGGED)):
        draw_structure(structure, dense(), tmp_path / f"{name}.png", "title")
    full, part = (imread(tmp_path / f"{name}.png") for name in ("dense", "ragged"))
    assert full.shape == part.shape and full.shape[0] > 300
    # Drawn as kept: 2 of 24 q/k dims, 3 of 24 v dims, 6 of 36 neurons; the legend adds a little.
    for colour, share in ((QK, 2 / 24), (V, 3 / 24), (NEURON, 6 / 36)):
        assert area(part, colour) / area(full, colour) == pytest.approx(share, abs=0.04)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["dense.png", "ragged.png"]


def test_picture_says_how_much_is_kept():
    texts = [text.get_text() for text in structure_figure(RAGGED, dense(), "half").axes[0].texts]
    assert "half" in texts and "1/2 heads\nq/k 25%  v 38%" in texts and "6/12\n50%" in texts
    assert texts.count("attention skipped") == 1 and texts.count("MLP skipped") == 1
    assert not any("tokens" in text for text in texts)
    slim = Structure((RAGGED.blocks[0], replace(RAGGED.blocks[1], tokens=9), RAGGED.blocks[2]))
    assert "9 tokens" in [text.get_text() for text in structure_figure(slim, dense(), "half").axes[0].texts]


@pytest.mark.parametrize("neurons", [0, 1, 197, 3072])
def test_picture_takes_any_number_of_neurons(neurons, tmp_path):
    structure = dense(blocks=1, heads=1, dims=1, neurons=neurons)
    draw_structure(structure, structure, tmp_path / "a.png", "")
    assert (tmp_path / "a.png").stat().st_size > 1000


class Slow(nn.Module):
    """Takes a given time."""

    def __init__(self, ms):
        super().__init__()
        self.ms, self.calls = ms, 0

    def forward(self, images):
        self.calls += 1
        assert not self.training and torch.is_inference_mode_enabled()
        time.sleep(self.ms / 1e3)
        return images


def test_latency_is_in_milliseconds_and_leaves_the_mode_alone():
    models = {"fast": Slow(2).eval(), "slow": Slow(10).train()}
    times = measure_latency(models, torch.zeros(1), repeats=5)
    assert 2 <= times["fast"] < times["slow"] and 10 <= times["slow"] < 100
    assert not models["fast"].training and models["slow"].training
    assert models["fast"].calls == models["slow"].calls == 7


def test_latency_of_slow_models_ends_after_three_rounds():
    model = Slow(20)
    measure_latency({"slow": model}, torch.zeros(1), repeats=1000, seconds=0.0)
    assert model.calls == 5


def test_table_shows_teacher_and_compressed_model():
    summary = dict(model="vit", data="digits", budget=0.5, metric="macs", teacher_top1=98.8, final_top1=98.4)
    summary |= dict(dense_macs=12_000_000, final_macs=6_000_000, dense_params=700_000, final_params=350_000)
    summary["latency"] = [{"batch": 64, "teacher_ms": 8.0, "compressed_ms": 4.0}]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(result_table(summary))
    text = console.export_text()
    for part in ("98.80", "98.40", "-0.40", "12.000 M", "0.5000", "350.000 k", "batch 64", "0.50"):
        assert part in text

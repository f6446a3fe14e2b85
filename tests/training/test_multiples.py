"""--round-to auto: good multiples are read off a measured curve, kept, and taken up by a resumed run."""

import dataclasses
import json

import pytest
import torch
from oracle import small_vit
from torch.utils.data import DataLoader, TensorDataset

import uvc
from uvc.cli import run
from uvc.config import Config, SolverConfig
from uvc.training import multiples
from uvc.training.multiples import Multiples, around_half, good, measure, settle


@pytest.mark.parametrize(
    ("time", "multiple"),
    [
        (lambda n: n, 1),
        (lambda n: -(-n // 8) * 8, 8),
        (lambda n: -(-n // 8) * 8 + (n % 8 != 0), 8),
        (lambda n: -(-n // 16) * 16, 16),
        (lambda n: 5, 32),
    ],
    ids=["each costs", "whole eights", "parts of eights cost more", "whole sixteens", "all alike"],
)
def test_a_multiple_is_good_where_rounding_up_takes_no_longer(time, multiple):
    curve = tuple((n, float(time(n))) for n in range(96, 289, 2))
    assert good(curve, (1, 4, 8, 16, 32)) == multiple


def test_sizes_lie_around_a_half_and_keep_pairs_together():
    assert around_half(64, 1) == tuple(range(16, 49))
    assert around_half(64, 2) == tuple(range(16, 49, 2))
    assert around_half(1536, 4)[0] == 768 - 96 and around_half(1536, 4)[-1] == 768 + 96


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock by which dims run in fours and neurons in eights."""
    monkeypatch.setenv("UVC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("UVC_MEASURE", raising=False)
    calls = []

    def ms(form, call):
        calls.append(form)
        if form.record.attn:
            return float(-(-len(form.record.v_dims[0]) // 4) * 4)
        return float(-(-len(form.record.neurons) // 8) * 8)

    monkeypatch.setattr(multiples, "form_ms", ms)
    return calls


def model():
    return small_vit(embed_dim=64, num_heads=2, mlp_ratio=2.0)  # heads of 32 dims, 128 neurons


def test_the_curve_of_a_model_is_measured_once_and_the_model_stays(clock):
    vit = model().train()
    before = {name: t.clone() for name, t in vit.state_dict().items()}
    found = settle(vit)
    assert (found.dims, found.neurons) == (4, 8) and found.line.endswith("measured here")
    assert [n for n, _ in found.dims_curve] == list(range(8, 25))
    assert vit.training and all(torch.equal(t, before[name]) for name, t in vit.state_dict().items())
    measured = len(clock)
    multiples.autotune._known.clear()  # as in another process
    assert settle(model()) == found and len(clock) == measured


def test_where_nothing_may_be_measured_the_usual_multiples_that_divide_serve(monkeypatch):
    monkeypatch.setenv("UVC_MEASURE", "0")
    assert settle(model())[:2] == (4, 8)
    assert settle(small_vit())[:2] == (2, 8)  # heads of 6 dims, 40 neurons


def test_the_clock_runs():
    found = measure(model())
    assert min(ms for _, ms in (*found.dims_curve, *found.neurons_curve)) > 0
    assert 32 % found.dims == 0 and 128 % found.neurons == 0


def test_a_run_takes_them_and_a_resumed_one_takes_them_up(clock, tmp_path):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 16, 16), torch.randint(5, (16,)))
    config = Config(
        warmup_epochs=0, search_epochs=2, post_epochs=1, solver=SolverConfig(round_to="auto", every=1)
    )
    loader = DataLoader(data, 8)
    result = uvc.compress(model(), loader, loader, config=config, out=tmp_path / "run")
    for block in result.structure.blocks:
        assert not any(len(dims) % 4 for dims in block.qk_dims + block.v_dims) and len(block.neurons) % 8 == 0
    kept = json.loads((tmp_path / "run" / multiples.MULTIPLES).read_text())
    assert (kept["dims"], kept["neurons"]) == (4, 8)
    assert settle(model(), out=tmp_path / "run") == Multiples.from_data(kept)
    (tmp_path / "run" / multiples.MULTIPLES).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        settle(model(), out=tmp_path / "run")


def test_the_command_takes_auto_and_refuses_other_words(capsys):
    assert run(["compress", "--round-to", "auto", "--show-config"]) == 0
    assert 'round_to = "auto"' in capsys.readouterr().out
    assert run(["compress", "--round-to", "fine", "--show-config"]) == 2
    with pytest.raises(ValueError, match="round_to"):
        dataclasses.replace(SolverConfig(), round_to="fine")

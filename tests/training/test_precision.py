"""`--precision auto`: what is taken and said, and that nothing is touched; float16's loss scale."""

import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

import uvc.cli
import uvc.models
from uvc.config import Config, SolverConfig
from uvc.environment import choose_device
from uvc.solver import Pruner
from uvc.training import loss_scale, precision
from uvc.training.compress import compress
from uvc.training.data import load_data
from uvc.training.logger import RunLog
from uvc.training.loss_scale import LossScale
from uvc.training.losses import Classification
from uvc.training.precision import WORTH, Precision, settle
from uvc.training.trainer import Trainer

LONG = Config(warmup_epochs=WORTH, search_epochs=0, post_epochs=0, precision="auto")


@pytest.fixture
def model():
    return timm.create_model("uvc_vit_digits", embed_dim=24, depth=2, num_heads=2).eval()


@pytest.fixture
def data():
    return load_data("digits", model_input=(1, 8, 8), batch_size=256, seed=0, validation="val")


def takes(monkeypatch, **ms):
    """Lets a step take so many milliseconds in each precision; returns what was timed."""
    asked = []

    def timed(step, name, images, device):
        step(name, images)
        asked.append(name)
        return ms[name]

    monkeypatch.setattr(precision, "timed", timed)
    return asked


@pytest.mark.parametrize(
    "asked, ratio, used, said",
    [
        ("auto", 0.6, "bfloat16", "bfloat16; a step in bfloat16 takes 0.60 times as long as in float32"),
        ("auto", 1.9, "float32", "float32; a step in bfloat16 takes 1.90 times as long as in float32"),
        ("auto", 0.97, "float32", "float32; a step in bfloat16 takes 0.97 times as long as in float32"),
        ("bfloat16", 0.6, "bfloat16", ""),
        ("bfloat16", 1.03, "bfloat16", ""),
        ("bfloat16", 1.9, "bfloat16", "a step in bfloat16 takes 1.90 times as long as in float32; "
         "--precision auto takes what is faster"),
        ("float16", 1.9, "float16", "a step in float16 takes 1.90 times as long as in float32; "
         "--precision auto takes what is faster"),
    ],
)  # fmt: skip
def test_the_faster_is_taken_and_what_was_asked_for_is_followed(
    asked, ratio, used, said, model, data, monkeypatch
):
    takes(monkeypatch, float32=1.0, bfloat16=ratio, float16=ratio)
    found = settle(model, data.train, replace(LONG, precision=asked))
    assert (found.asked, found.used) == (asked, used)
    assert found.line == (said and f"precision: {said}")
    assert found.ratio == pytest.approx(ratio)


def test_rounds_alternate(model, data, monkeypatch):
    asked = takes(monkeypatch, float32=1.0, bfloat16=1.0)
    settle(model, data.train, LONG)
    rounds = list(zip(asked[2::2], asked[3::2], strict=True))
    assert len(rounds) >= 2 and all(set(pair) == {"float32", "bfloat16"} for pair in rounds)
    assert rounds[0] == rounds[1][::-1]


@pytest.mark.parametrize("asked, steps", [("float32", WORTH), ("auto", WORTH - 1), ("bfloat16", WORTH - 1)])
def test_float32_and_short_runs_are_not_measured(asked, steps, model, monkeypatch):
    times = takes(monkeypatch, float32=1.0, bfloat16=1.0)
    found = settle(
        model, range(steps), Config(warmup_epochs=1, search_epochs=0, post_epochs=0, precision=asked)
    )
    assert times == [] and found.ratio is None
    assert found.used == ("float32" if asked == "auto" else asked)
    assert found.line == (
        "precision: float32; in fewer than 200 steps nothing is measured" if asked == "auto" else ""
    )


def test_a_measurement_leaves_model_and_random_numbers_bit_equal(data):
    model = timm.create_model("uvc_vit_digits", embed_dim=24, depth=2, num_heads=2, drop_rate=0.1).eval()
    model.register_buffer("seen", torch.zeros(3))
    before, drawn = (
        copy.deepcopy(model.state_dict()),
        (torch.get_rng_state(), np.random.get_state()[1].copy()),
    )
    found = settle(model, data.train, LONG)
    assert found.ratio > 0
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), drawn[0]) and (np.random.get_state()[1] == drawn[1]).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training


def test_a_run_with_auto_is_that_with_what_was_taken(data, model, tmp_path, monkeypatch):
    takes(monkeypatch, float32=1.0, bfloat16=0.5)
    monkeypatch.setattr(precision, "WORTH", 1)
    config = Config(warmup_epochs=1, search_epochs=2, post_epochs=1, batch_size=256)
    twin = copy.deepcopy(model)
    found = compress(
        model, data.train, data.val, config=replace(config, precision="auto"), out=tmp_path / "a"
    )
    again = load_data("digits", model_input=(1, 8, 8), batch_size=256, seed=0, validation="val")
    wanted = compress(twin, again.train, again.val, config=replace(config, precision="bfloat16"))
    assert found.precision == wanted.precision == "bfloat16"
    assert all(
        torch.equal(a, b) for a, b in zip(found.model.parameters(), wanted.model.parameters(), strict=True)
    )
    noted = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert noted[0]["event"] == "precision" and noted[0]["used"] == "bfloat16" and noted[0]["ratio"] == 0.5


def test_what_is_slower_than_float32_is_said_once_in_a_run(data, model, tmp_path, monkeypatch):
    asked = takes(monkeypatch, float32=1.0, bfloat16=2.0)
    monkeypatch.setattr(precision, "WORTH", 1)
    config = Config(warmup_epochs=0, search_epochs=1, post_epochs=0, batch_size=256, precision="bfloat16")
    with pytest.warns(UserWarning, match="a step in bfloat16 takes 2.00 times as long as in float32"):
        result = compress(model, data.train, data.val, config=config, out=tmp_path)
    assert result.precision == "bfloat16"
    asked.clear()
    fresh = timm.create_model("uvc_vit_digits", embed_dim=24, depth=2, num_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(fresh, data.train, data.val, config=config, out=tmp_path, resume=True)
    assert asked == []


def test_a_resumed_run_keeps_the_precision_that_it_began_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "WORTH", 1)
    takes(monkeypatch, float32=1.0, bfloat16=0.5)
    out = str(tmp_path / "run")
    epochs = ["--teacher-epochs", "1", "--warmup-epochs", "1", "--search-epochs", "1", "--post-epochs", "1"]
    real, calls = RunLog.phase, []

    def phase(self, name, steps):
        calls.append(name)
        if name == "search":
            raise KeyboardInterrupt
        real(self, name, steps)

    monkeypatch.setattr(RunLog, "phase", phase)
    given = ["compress", "--out", out, *epochs, "--batch-size", "256", "--precision", "auto"]
    given += ["--model-arg", "embed_dim=24", "--model-arg", "depth=2", "--model-arg", "num_heads=2"]
    assert uvc.cli.run(given) == 130
    said = "precision: bfloat16; a step in bfloat16 takes 0.50 times as long as in float32"
    assert capsys.readouterr().err.count(said) == 1
    monkeypatch.setattr(RunLog, "phase", real)
    # It would choose otherwise now.
    asked = takes(monkeypatch, float32=1.0, bfloat16=2.0)
    assert uvc.cli.run(["compress", "--resume", "--out", out]) == 0
    assert asked == [] and "precision" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["precision"] == "auto"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["precision"] == "bfloat16"


def test_a_broken_record_is_one_clear_line(tmp_path, model, data):
    Precision("auto", "bfloat16", "bfloat16", 0.5).save(tmp_path)
    assert settle(model, data.train, LONG, tmp_path) == Precision("auto", "bfloat16", "bfloat16", 0.5)
    (tmp_path / "precision.json").write_text("{")
    with pytest.raises(ValueError, match=r"precision.json: it cannot be read: .*; delete it"):
        settle(model, data.train, LONG, tmp_path)


def test_a_loss_takes_no_precision_that_is_not_settled():
    with pytest.raises(ValueError, match="precision: 'auto' is settled by compress alone; name float32, "):
        Classification(precision="auto")


def test_old_gpus_are_measured_in_float16(monkeypatch):
    device = torch.device("cuda")
    for native, name in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert precision._half(device) == name
    assert precision._half(choose_device("cpu", None)) == "bfloat16"


class Watching(Pruner):
    """Keeps what it is shown, and lets the first pass of a step overflow."""

    def __init__(self, model, overflows=0):
        super().__init__(model)
        self.seen, self.calls, self.overflows = [], 0, overflows

    def before(self):
        self.calls += 1

    def observe(self, scale=1.0):
        self.seen.append((scale, self.model.head.weight.grad.norm().item() / scale))


class Overflowing(Classification):
    def __init__(self, times):
        super().__init__(precision="float32")
        self.times = times

    def __call__(self, model, images, labels):
        out = super().__call__(model, images, labels)
        if self.times:
            self.times -= 1
            out["loss"] = out["loss"] * 1e38
        return out


@pytest.mark.parametrize("overflows", [0, 1, 3])
def test_a_step_that_overflows_is_repeated_at_half_the_scale(overflows, model, data):
    model, twin = uvc.convert(model), uvc.convert(copy.deepcopy(model))
    config, batches = Config(precision="float16"), list(data.train)[:1]
    trainer = Trainer(model, batches, data.val, config, RunLog(None), None)
    pruner = Watching(model)
    trainer.phase("warmup", 1, Overflowing(overflows), trainer.optimizer(1e-3), pruner)
    plain = Trainer(twin, batches, data.val, replace(config, precision="float32"), RunLog(None), None)
    other = Watching(twin)
    plain.phase("warmup", 1, Classification(), plain.optimizer(1e-3), other)
    assert pruner.calls == 1 + overflows and other.calls == 1
    assert [scale for scale, _ in pruner.seen] == [2.0 ** (16 - overflows)]
    assert pruner.seen[0][1] == pytest.approx(other.seen[0][1], rel=1e-5) and other.seen[0][0] == 1.0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_loss_that_no_scale_helps_ends_the_run(model, data):
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    trainer = Trainer(
        uvc.convert(model), data.train, data.val, Config(precision="float16"), RunLog(None), None
    )
    with pytest.raises(RuntimeError, match="warmup: epoch 0, batch 0: the loss is nan"):
        trainer.phase("warmup", 1, Classification(precision="float16"), trainer.optimizer(1e-3))
    assert trainer.scale.value == 1.0


def test_a_scale_grows_after_many_steps_and_goes_through_a_checkpoint():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    scale, other = LossScale("float16"), LossScale("float16")
    for step in range(2000):
        if step == 1999:
            other.load_state(json.loads(json.dumps(scale.state())))
        scale.unscale([weight])
    assert scale.value == 2.0**17 and other.value == 2.0**16
    other.unscale([weight])
    assert other.value == 2.0**17


def test_a_search_in_float16_that_overflows_ends_at_its_budget(model, data, monkeypatch):
    fitted, fits = [], LossScale.fits
    monkeypatch.setattr(
        LossScale, "fits", lambda self, weights: fitted.append(fits(self, weights)) or fitted[-1]
    )
    config = Config(
        warmup_epochs=0,
        search_epochs=3,
        post_epochs=1,
        precision="float16",
        solver=SolverConfig(tokens=1),
    )
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**30)
    result = compress(model, data.train, data.val, budget=0.5, config=config)
    assert fitted[0] is False and fitted.count(True) == result.steps == 4 * len(data.train)
    assert result.precision == "float16" and result.cost.macs <= 0.5 * result.dense_cost.macs
    assert result.history[-1]["top1"] > 10

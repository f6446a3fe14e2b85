"""`compress` end to end on a few digits: the budget, what is learnt, and resuming to the bit."""

import dataclasses
import json
import math

import pytest
import timm
import torch
from oracle import TOLERANCE, error, stored

import uvc
import uvc.models
from uvc.compaction import form_for, forms_of
from uvc.config import Config, SolverConfig
from uvc.training.compress import compress, train_teacher
from uvc.training.data import load_data
from uvc.training.evaluation import evaluate
from uvc.training.logger import RunLog

CONFIG = Config(
    teacher_epochs=3,
    warmup_epochs=1,
    search_epochs=4,
    post_epochs=2,
    batch_size=64,
    learning_rate=2e-3,
    search_learning_rate=1e-3,
)


def digits_model(name="uvc_vit_digits", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{"embed_dim": 24, "depth": 2, "num_heads": 2, **options})


def digits_data():
    return load_data("digits", model_input=(1, 8, 8), batch_size=64, seed=0, validation="val")


def test_compress_meets_the_budget_and_learns():
    model, data = digits_model(), digits_data()
    before = evaluate(model, data.val)
    train_teacher(model, data.train, data.val, CONFIG, RunLog(None))
    result = compress(model, data.train, data.val, budget=0.5, config=CONFIG)
    unit = max(map(max, uvc.costs.prices(result.model, "macs")[3:]))
    assert 0.5 * result.dense_cost.macs - unit < result.cost.macs <= 0.5 * result.dense_cost.macs
    assert result.final_top1 > before + 20
    small = uvc.compact(result.model)
    assert uvc.cost(small) == result.cost
    assert evaluate(small, data.val) == result.final_top1
    phases = [entry["phase"] for entry in result.history]
    assert phases == ["warmup"] + ["search"] * 4 + ["harden"] + ["post-train"] * 2
    assert result.steps == 7 * len(data.train)


def test_on_a_gpu_the_saved_model_runs_all_heads_of_a_layer_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("uvc.training.compress.form_for", lambda device: form_for(torch.device("cuda")))
    data = digits_data()
    config = dataclasses.replace(CONFIG, warmup_epochs=0, search_epochs=1, post_epochs=1)
    result = compress(digits_model(), data.train, data.val, budget=0.7, config=config, out=tmp_path)
    small, images = uvc.load(tmp_path), next(iter(data.val))[0]
    assert forms_of(small) == ("padded",) * 2 and uvc.cost(small) == result.cost
    assert form_for(torch.device("cpu")) == "grouped"
    assert error(small.eval()(images), result.model(images)) < TOLERANCE[torch.float32]


def test_the_folder_holds_the_compacted_model_at_the_end(tmp_path):
    data = digits_data()
    config = dataclasses.replace(CONFIG, search_epochs=1, post_epochs=1)
    result = compress(digits_model(), data.train, data.val, budget=0.7, config=config, out=tmp_path)
    small, images = uvc.load(tmp_path), next(iter(data.val))[0]
    again = uvc.compact(result.model)
    assert stored(small) == stored(again)
    assert error(small(images), again(images)) < TOLERANCE[images.dtype]
    assert uvc.Structure.from_json((tmp_path / "structure.json").read_text()) == result.structure


@pytest.mark.parametrize(("loader", "says"), [([], "yields no batch"), (iter([]), "has no length")])
def test_a_loader_that_cannot_train_is_refused_by_name(loader, says):
    with pytest.raises(ValueError, match=f"train_loader: it {says}"):
        compress(digits_model(), loader, digits_data().val)


def test_a_distilled_model_learns_through_its_distillation_token():
    model, data = digits_model("uvc_vit_digits_distilled"), digits_data()
    config = dataclasses.replace(CONFIG, search_epochs=1, post_epochs=1)
    train_teacher(model, data.train, data.val, dataclasses.replace(CONFIG, teacher_epochs=1), RunLog(None))
    before = model.head_dist.weight.clone()
    result = compress(model, data.train, data.val, budget=0.8, config=config)
    assert not torch.equal(result.model.head_dist.weight, before)
    assert result.cost.macs <= 0.8 * result.dense_cost.macs


@pytest.mark.parametrize("regularised", [False, True], ids=["plain", "mixed and averaged"])
@pytest.mark.parametrize("stop_after", ["warmup", "search", "post-train"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, stop_after, regularised):
    config = dataclasses.replace(CONFIG, search_epochs=2, post_epochs=2)
    if regularised:
        config = dataclasses.replace(config, mixup=0.8, cutmix=1.0, ema_decay=0.9, label_smoothing=0.1)

    class Stop(RunLog):
        def note(self, **fields):
            super().note(**fields)
            if self._phase == stop_after and fields.get("epoch") == (1 if stop_after == "post-train" else 0):
                raise KeyboardInterrupt

    def run(log=None, resume=False, out=tmp_path / "whole"):
        data = digits_data()
        return compress(
            digits_model(), data.train, data.val, budget=0.6, config=config, out=out, log=log, resume=resume
        )

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(log=Stop(tmp_path / "broken"), out=tmp_path / "broken")
    resumed = run(resume=True, out=tmp_path / "broken")
    assert resumed.structure == whole.structure
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.final_top1 == whole.final_top1 and resumed.before_post_top1 == whole.before_post_top1
    lines = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert {"warmup", "search", "post-train"} <= {line["phase"] for line in lines}


def test_averaged_weights_are_the_result_and_those_of_every_step_count():
    model, data = digits_model(), digits_data()
    config = dataclasses.replace(CONFIG, teacher_epochs=1, ema_decay=0.6)
    seen = []

    def watch(*_):
        """Sees the weights after each step, as they are when the next one begins."""
        if model.training:
            seen.append(model.head.weight.detach().clone())

    model.patch_embed.register_forward_pre_hook(watch)
    train_teacher(model, data.train, data.val, config, RunLog(None))
    # What timm's warm-up makes of a decay of 0.6 after 1, 2, 3 and more steps.
    decays = [0.0] + [min(1 - (1 + n) ** (-2 / 3), 0.6) for n in range(1, len(seen))]
    average = None
    for decay, weight in zip(decays, seen[1:], strict=False):
        average = weight if average is None else decay * average + (1 - decay) * weight
    # The last step is not seen, but its weight in the average is.
    last = (model.head.weight.detach() - decays[-1] * average) / (1 - decays[-1])
    assert 0 < float((last - seen[-1]).abs().max()) < 0.02
    assert float((model.head.weight.detach() - seen[-1]).abs().max()) > 1e-4


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"ema_decay: 1\.0; it must be in \[0, 1\)"):
        dataclasses.replace(CONFIG, ema_decay=1.0)


def test_resuming_with_other_settings_is_refused(tmp_path):
    data = digits_data()
    config = dataclasses.replace(CONFIG, search_epochs=1, post_epochs=1)
    compress(digits_model(), data.train, data.val, budget=0.6, config=config, out=tmp_path)
    other = dataclasses.replace(config, learning_rate=1e-4)
    for budget, changed in ((0.6, other), (0.5, config)):
        with pytest.raises(ValueError, match="written with other settings"):
            compress(
                digits_model(), data.train, data.val, budget=budget, config=changed, out=tmp_path, resume=True
            )


def test_a_truncated_checkpoint_is_one_clear_line(tmp_path):
    data = digits_data()
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: not a readable checkpoint"):
        compress(digits_model(), data.train, data.val, budget=0.6, config=CONFIG, out=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(budget={}), "names no metric"),
        (dict(budget={"macs": 0.5, "params": 1e-4}), "budget: 0.0001 is below .* params budget"),
        (
            dict(budget={"macs": 0.5, "joules": 0.5}),
            "metric must be one of macs, params, latency, got 'joules'",
        ),
        (dict(latency=object()), "latency: a table is given, but no budget is in it"),
        (
            dict(
                budget={"macs": 0.5, "params": 0.5},
                config=dataclasses.replace(CONFIG, solver=SolverConfig(method="published")),
            ),
            "the published method takes one",
        ),
        (
            dict(config=dataclasses.replace(CONFIG, solver=SolverConfig(round_to=(5, 1)))),
            "round_to: 5 does not divide the head dim of this model, 12",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_budget_can_be_is_refused_before_any_training(arguments, says):
    model, data = digits_model(), digits_data()
    before = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match=says):
        compress(model, data.train, data.val, **arguments)
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.nan, math.inf, 1e-4])
def test_a_bad_budget_is_refused_before_any_training(budget):
    model, data = digits_model(), digits_data()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="budget: "):
        compress(model, data.train, data.val, budget=budget)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

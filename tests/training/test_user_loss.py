"""`compress` with a loss and a score of the user's own: any batch, any output."""

import dataclasses
import json
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_compress import CONFIG, digits_data, digits_model

import uvc
from uvc.training.batches import moved

SHORT = dataclasses.replace(CONFIG, search_epochs=2, post_epochs=1)
DISTILL = dataclasses.replace(CONFIG.distill, kind="none")


class Dicts:
    """Batches of images without labels, by name."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for images, labels in self.loader:
            yield {"pixels": images, "classes": labels, "names": ["digit"] * len(labels)}


def cross_entropy(model, batch):
    return {"loss": F.cross_entropy(model(batch["pixels"]), batch["classes"]), "half": 0.5}


def test_cross_entropy_as_a_loss_of_ones_own_ends_with_the_weights_of_ours():
    data = digits_data()
    config = dataclasses.replace(SHORT, distill=DISTILL)
    ours = uvc.compress(digits_model(), data.train, data.val, 0.6, config=config)
    data = digits_data()
    own = uvc.compress(digits_model(), Dicts(data.train), data.val, 0.6, config=SHORT, loss=cross_entropy)
    assert own.structure == ours.structure and own.final_top1 == ours.final_top1
    a, b = ours.model.state_dict(), own.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_dense_output_learns_and_its_score_stands_in_history_and_log(tmp_path):
    # Which pixels of each 2 x 2 patch have ink: a class for every patch, and no image has a label.
    model, data = digits_model(global_pool="", class_token=False, num_classes=4), digits_data()

    def ink(images):
        return F.unfold(images, 2, stride=2).transpose(1, 2).argmax(2)

    def loss(model, batch):
        images, _ = batch
        logits, aim = model(images), ink(images)
        found = F.cross_entropy(logits.flatten(0, 1), aim.flatten())
        return {"loss": found, "right": (logits.argmax(2) == aim).float().mean(), "logits": logits}

    def score(model):
        assert not model.training and not torch.is_grad_enabled()
        images = data.val.images
        return (model(images).argmax(2) == ink(images)).float().mean()

    result = uvc.compress(
        model, data.train, budget=0.6, config=CONFIG, loss=loss, evaluate=score, out=tmp_path
    )
    assert result.final_score > result.teacher_score + 0.05 and result.measure == "score"
    assert result.cost.macs <= 0.6 * result.dense_cost.macs
    assert all("score" in entry and "top1" not in entry for entry in result.history)
    with pytest.raises(AttributeError, match="read final_score"):
        _ = result.final_top1
    with torch.no_grad():
        assert float(score(uvc.load(tmp_path))) == pytest.approx(result.final_score, abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(("right" in line) == ("loss" in line) for line in lines)
    assert not any("logits" in line for line in lines)
    assert {"score" in line for line in lines if "epoch" in line} == {True}


def test_features_of_a_frozen_copy_are_matched_without_labels():
    model, data = digits_model(num_classes=0), digits_data()
    teacher = digits_model(num_classes=0).eval()

    def loss(model, batch):
        with torch.no_grad():
            aim = teacher.forward_features(batch[0])
        return {"loss": (model.forward_features(batch[0]) - aim).square().mean()}

    def score(model):
        return -float(loss(model, (data.val.images, None))["loss"])

    result = uvc.compress(model, data.train, budget=0.6, config=CONFIG, loss=loss, evaluate=score)
    assert result.teacher_score == pytest.approx(0, abs=1e-6)
    assert result.before_post_score < result.final_score < -1e-6


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda m, b: m(b["pixels"]).mean(), r'loss: it returned a Tensor; return \{"loss": scalar'),
        (lambda m, b: {"cost": m(b["pixels"]).mean()}, r"loss: it returned a dict of cost; return"),
        (lambda m, b: {"loss": m(b["pixels"])}, r'loss: its "loss" is a tensor \[\d+, 10\]; return a float'),
        (lambda m, b: {"loss": 0.5}, 'loss: its "loss" is a float; return a floating'),
        (lambda m, b: {"loss": m(b["pixels"]).mean().detach()}, 'loss: its "loss" has no gradient'),
        (lambda m, b: {"loss": m(b["pixels"]).mean(), "step": 1}, "loss: 'step' is a name of the log"),
        (
            lambda m, b: {"loss": m(b["pixels"]).mean() * math.nan},
            "warmup: epoch 0, batch 0: the loss is nan",
        ),
    ],
)
def test_a_loss_that_is_none_is_one_line_before_any_step(loss, says):
    model, data = digits_model(), digits_data()
    before = model.head.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=says) as caught:
        uvc.compress(model, Dicts(data.train), data.val, 0.6, config=SHORT, loss=loss)
    assert "\n" not in str(caught.value) and torch.equal(model.head.weight, before)


@pytest.mark.parametrize(
    ("found", "says"),
    [(None, "a NoneType; return a number"), (math.nan, "returned nan"), (torch.ones(2), "a Tensor")],
)
def test_a_score_that_is_no_number_is_one_line_before_any_step(found, says):
    model, data = digits_model(), digits_data()
    with pytest.raises(ValueError, match=f"evaluate: it .*{says}"):
        uvc.compress(model, data.train, budget=0.6, config=SHORT, evaluate=lambda model: found)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(teacher=digits_model()), "teacher: with loss= distillation is the loss's own"),
        (dict(teacher_cache="answers"), "teacher_cache: with loss="),
        (dict(config=dataclasses.replace(SHORT, mixup=0.8)), r"mixup: 0\.8, but with loss="),
        (dict(config=dataclasses.replace(SHORT, accumulate=2)), "accumulate: 2, but with loss="),
        (dict(config=dataclasses.replace(SHORT, precision="auto")), "precision: 'auto' measures"),
        (dict(val_loader=None), "val_loader: none given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_the_losss_own_is_refused_beside_it(arguments, says):
    data = digits_data()
    given = {"val_loader": data.val, "config": SHORT, **arguments}
    with pytest.raises(ValueError, match=says):
        uvc.compress(digits_model(), Dicts(data.train), budget=0.6, loss=cross_entropy, **given)


def test_a_resumed_run_keeps_its_scores(tmp_path):
    data, seen = digits_data(), []

    def score(model):
        seen.append(len(seen))
        if len(seen) == 6 and not tmp_path.joinpath("again").exists():
            raise KeyboardInterrupt
        return float(model.head.weight.sum())

    def run(out, resume=False):
        return uvc.compress(
            digits_model(),
            Dicts(digits_data().train),
            budget=0.6,
            config=SHORT,
            loss=cross_entropy,
            evaluate=score,
            out=out,
            resume=resume,
        )

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    tmp_path.joinpath("again").touch()
    resumed, whole = run(tmp_path / "broken", resume=True), run(tmp_path / "whole")
    assert resumed.before_post_score == whole.before_post_score
    assert resumed.final_score == whole.final_score
    with pytest.raises(ValueError, match="written with other settings"):
        uvc.compress(
            digits_model(), data.train, data.val, 0.6, config=SHORT, out=tmp_path / "whole", resume=True
        )


class Pair(NamedTuple):
    image: torch.Tensor
    name: str


def test_tensors_of_a_batch_are_moved_wherever_they_stand():
    batch = ({"a": torch.ones(2)}, [Pair(torch.ones(1), "x")], "y", 3)
    found = moved(batch, torch.device("meta"))
    assert found[0]["a"].is_meta and found[1][0].image.is_meta and found[1][0].name == "x"
    assert found[2:] == ("y", 3)

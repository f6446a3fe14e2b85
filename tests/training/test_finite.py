"""A loss, a gradient or a weight that is not finite ends a run in one line and is never saved."""

import dataclasses
import json

import pytest
import timm
import torch
from test_compress import CONFIG, digits_data, digits_model

import uvc
import uvc.models
from uvc.config import SolverConfig
from uvc.constraints import limits
from uvc.io.finite import first_not_finite
from uvc.solver import Search
from uvc.training.checkpoint import load_run, optimizer_tensors
from uvc.training.compress import compress
from uvc.training.finite import FiniteCheck
from uvc.training.logger import RunLog
from uvc.training.losses import Classification
from uvc.training.trainer import Trainer

SHORT = dataclasses.replace(CONFIG, warmup_epochs=1, search_epochs=1, post_epochs=1)


class Spoilt:
    """The batches of a loader, one of which is changed."""

    def __init__(self, loader, at, change):
        self.loader, self.at, self.change, self.seen = loader, at, change, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            if self.seen == self.at:
                images, labels = self.change(images.clone(), labels)
            self.seen += 1
            yield images, labels


def nan_pixel(images, labels):
    images[3, 0, 2, 2] = torch.nan
    return images, labels


def huge(images, labels):
    return images * 1e38, labels


@pytest.mark.parametrize("change", [nan_pixel, huge])
@pytest.mark.parametrize(("at", "phase", "epoch", "batch"), [(2, "warmup", 0, 2), (19, "search", 0, 4)])
def test_the_step_is_named_and_the_last_good_checkpoint_stays(tmp_path, change, at, phase, epoch, batch):
    data, model = digits_data(), digits_model()
    train = Spoilt(data.train, at, change)
    with pytest.raises(
        RuntimeError, match=rf"{phase}: epoch {epoch}, batch {batch}: .*first in \S+"
    ) as caught:
        compress(model, train, data.val, budget=0.7, config=SHORT, out=tmp_path)
    assert "\n" not in str(caught.value)
    assert first_not_finite(model.state_dict()) is None
    assert (tmp_path / "checkpoint.safetensors").exists() == (phase == "search")
    assert not (tmp_path / "model.safetensors").exists()
    if change is nan_pixel:
        assert "image 3 of this batch holds NaN" in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_image_among_those_that_are_evaluated_is_no_wrong_answer(value):
    data = digits_data()
    images, labels = next(iter(data.val))
    images = images.clone()
    images[0] = value
    with pytest.raises(RuntimeError, match=r"val_loader: batch 0: .* NaN or infinite"):
        compress(digits_model(), data.train, [(images, labels)], budget=0.7, config=SHORT)


@pytest.mark.parametrize("labels", [lambda y: y - 100, lambda y: y + 10, lambda y: y.float()])
def test_labels_that_training_would_ignore_or_misread_are_refused(labels):
    data = digits_data()
    train = Spoilt(data.train, 1, lambda x, y: (x, labels(y)))
    with pytest.raises(ValueError, match="train_loader: labels are"):
        compress(digits_model(), train, data.val, budget=0.7, config=SHORT)


def test_one_hot_labels_train_as_the_classes_they_stand_for():
    class OneHot(Spoilt):
        def __iter__(self):
            return ((x, torch.eye(10)[y]) for x, y in self.loader)

    found = []
    for wrap in (lambda loader: loader, lambda loader: OneHot(loader, 0, None)):
        data = digits_data()
        result = compress(digits_model(), wrap(data.train), data.val, budget=0.7, config=SHORT)
        found.append(result)
    weights = [result.model.state_dict() for result in found]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_model_with_weights_that_are_not_finite_is_not_saved(tmp_path, value):
    model = uvc.convert(timm.create_model("uvc_vit_digits"))
    uvc.save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model.blocks[1].mlp.fc1.weight.data[3, 2] = value
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight holds 1 values of \d+"):
        uvc.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_steps_on_another_device_are_looked_at_when_read():
    model = torch.nn.Linear(2, 2)
    check = FiniteCheck(model, "search", lambda: "nothing is kept")
    check.pending = [(0, 7, torch.tensor([1.0, 2.0])), (0, 8, torch.tensor([1.0, torch.inf]))]
    with pytest.raises(RuntimeError, match=r"search: epoch 0, batch 8: the loss is 1 and .* gradient inf"):
        check.read()


def test_a_score_that_is_not_finite_is_not_saved(tmp_path):
    tensors = Search.state_dict

    def with_nan(search):
        found = {name: tensor.clone() for name, tensor in tensors(search).items()}
        next(t for name, t in found.items() if "importance" in name)[:1] = torch.nan
        return found

    data = digits_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "state_dict", with_nan)
        with pytest.raises(ValueError, match=r"search: epoch 1, batch 0: not saved: search \S*importance"):
            compress(digits_model(), data.train, data.val, 0.7, config=SHORT, out=tmp_path)
    _, facts = load_run(tmp_path / "checkpoint.safetensors")
    assert facts["phase"] == "warmup"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_skipped_step_leaves_weights_moments_scores_and_loss_scale_as_they_were(precision):
    model, data = uvc.convert(digits_model(class_token=True)), digits_data()
    config = dataclasses.replace(SHORT, precision=precision, skip_not_finite=1)
    trainer = Trainer(model, data.train, data.val, config, RunLog(None), None)
    search = Search(model, limits(model, 0.5), 20, SolverConfig(tokens=1, gate_every=1, anneal=(0.9, 1.0)))
    task, optimizer = Classification(precision=precision), trainer.optimizer(1e-3)
    check = FiniteCheck(model, "search", lambda: "nothing is kept")
    batches = iter(data.train)

    def seen():
        moments = optimizer_tensors(optimizer, model)
        scores = {n: t for n, t in search.state_dict().items() if "importance" in n or "theta" in n}
        return {n: t.clone() for n, t in (*model.state_dict().items(), *moments.items(), *scores.items())}

    for _ in range(2):
        trainer._train_step(task, next(batches), optimizer, search, check)
    before, scale = seen(), trainer.scale.state()
    trainer._train_step(task, nan_pixel(*next(batches)), optimizer, search, check)
    assert trainer.skipped == 1 and trainer.scale.state() == scale
    after = seen()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    trainer._train_step(task, next(batches), optimizer, search, check)
    assert first_not_finite(seen()) is None and not all(torch.equal(before[n], t) for n, t in seen().items())


def test_so_many_steps_are_skipped_and_said_and_the_next_one_ends_the_run(tmp_path):
    class Often(Spoilt):
        def __iter__(self):
            for images, labels in self.loader:
                self.seen += 1
                yield nan_pixel(images.clone(), labels) if self.seen in self.at else (images, labels)

    config = dataclasses.replace(SHORT, skip_not_finite=2)
    data, steps = digits_data(), len(digits_data().train)
    result = compress(
        digits_model(), Often(data.train, (3, steps + 5), None), data.val, 0.7, config=config, out=tmp_path
    )
    assert first_not_finite(result.model.state_dict()) is None and result.steps == 3 * steps
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    skipped = [(line["phase"], line["batch"]) for line in lines if line.get("event") == "skipped"]
    assert skipped == [("warmup", 2), ("search", 4)]
    data, out = digits_data(), tmp_path / "other"
    with pytest.raises(RuntimeError, match="search: epoch 0, batch 5: the loss is nan"):
        spoilt = Often(data.train, (3, steps + 5, steps + 6), None)
        compress(digits_model(), spoilt, data.val, 0.7, config=config, out=out)
    assert load_run(out / "checkpoint.safetensors")[1]["skipped"] == 1

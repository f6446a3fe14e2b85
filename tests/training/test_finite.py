"""A loss, a gradient or a weight that is not finite ends a run in one line and is never saved."""

import dataclasses

import pytest
import timm
import torch
from test_compress import CONFIG, digits_data, digits_model

import uvc
import uvc.models
from uvc.io.finite import first_not_finite
from uvc.solver import Search
from uvc.training.checkpoint import load_run
from uvc.training.compress import compress
from uvc.training.finite import FiniteCheck

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

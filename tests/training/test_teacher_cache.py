"""With its answers on disk the teacher is asked once, and losses and results are as with the teacher."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_compress import CONFIG, digits_data, digits_model
from torch.utils.data import DataLoader, TensorDataset

from uvc.config import Config, DataConfig, DistillConfig
from uvc.training.compress import compress
from uvc.training.data import load_data
from uvc.training.losses import Distillation, Mixing
from uvc.training.teacher_cache import CachedDistillation, TeacherCache, check_cache, fill

SHORT = dataclasses.replace(CONFIG, warmup_epochs=1, search_epochs=1, post_epochs=1)


class Counted(torch.nn.Module):
    """A teacher that counts how often it is asked in training."""

    def __init__(self, classes=10, scale=8.0):
        super().__init__()
        torch.manual_seed(5)
        self.head = torch.nn.Linear(64, classes)
        self.head.weight.data *= scale
        self.num_classes, self.asked = classes, 0

    def forward(self, images):
        self.asked += 1
        return self.head(images.flatten(1))


class Student(Counted):
    def __init__(self, classes=10):
        super().__init__(classes, 1.0)


def task(folder, teacher, data, config, **training):
    settings = Config(distill=config, **training)
    check_cache(folder, data.train, settings, teacher)
    return CachedDistillation(teacher, settings, folder, data.train)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_that_of_the_teacher_itself_to_half_precision(tmp_path, kind, temperature):
    config, teacher, student, data = (
        DistillConfig(kind, 0.7, temperature),
        Counted(),
        Student(),
        digits_data(),
    )
    plain, kept = Distillation(teacher, config), task(tmp_path, teacher, data, config)
    for images, labels in data.train:
        a = plain(student, images, labels)["loss"]
        grad_a = torch.autograd.grad(a, student.head.weight)[0]
        b = kept(student, images, labels)["loss"]
        grad_b = torch.autograd.grad(b, student.head.weight)[0]
        assert float(b) == pytest.approx(float(a), rel=2e-3)
        assert (grad_a - grad_b).abs().max() < 3e-3 * grad_a.abs().max()


def test_of_many_classes_the_most_probable_are_kept_and_the_rest_is_shared(tmp_path):
    cache = TeacherCache(tmp_path, {}, images=5, classes=40)
    probabilities = torch.randn(3, 40, dtype=torch.float64).mul(2).softmax(-1)
    cache.put(0, torch.tensor([4, 0, 2]), probabilities)
    values, classes = cache.get(0, torch.tensor([2, 4]))
    for row, right in zip(fill(values.double(), classes.long(), 40), probabilities[[2, 0]], strict=True):
        top = right.argsort(descending=True)[:10]
        assert float(row.sum()) == pytest.approx(1)
        assert float((row[top] - right[top]).abs().max()) < 1e-3
        others = [float(row[i]) for i in range(40) if i not in top.tolist()]
        assert others == pytest.approx([(1 - float(right[top].sum())) / 30] * 30, abs=1e-4)
    assert cache.get(0, torch.tensor([1])) is None and cache.get(1, torch.tensor([2])) is None


def test_the_teacher_is_asked_once_for_all_budgets_and_the_results_are_the_same(tmp_path):
    weights, asked = [], []
    for budget in (0.6, 0.6, 0.4):
        data, teacher = digits_data(), Counted()
        result = compress(
            digits_model(), data.train, data.val, budget, "macs", teacher, SHORT, teacher_cache=tmp_path
        )
        asked.append(teacher.asked)
        weights.append(result.model.state_dict())
    evaluations = len(digits_data().val)
    assert asked == [evaluations + 3 * len(digits_data().train), evaluations, evaluations]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_with_mixing_the_same_batches_are_mixed_alike_in_every_run(tmp_path):
    config = dataclasses.replace(SHORT, mixup=0.8, cutmix=1.0)
    asked = []
    for draws in (0, 7):
        np.random.seed(draws)
        data, teacher = digits_data(), Counted()
        compress(digits_model(), data.train, data.val, 0.6, "macs", teacher, config, teacher_cache=tmp_path)
        asked.append(teacher.asked)
    assert asked[1] == len(digits_data().val) < asked[0]


def test_a_seeded_mix_leaves_numpys_generator_alone():
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    mixing = Mixing(dataclasses.replace(CONFIG, mixup=0.8), 10)
    before = np.random.get_state()[1].copy()
    a, b, c = (mixing(images, labels, seed) for seed in (-3, -3, 4))
    assert np.array_equal(before, np.random.get_state()[1])
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])


SOFT = DistillConfig("soft", 0.5, 2.0)


def digits(**changes):
    return load_data("digits", **{"model_input": (1, 8, 8), "batch_size": 64, "validation": "val", **changes})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(teacher=Counted(scale=2.0)), "another teacher"),
        (dict(config=DistillConfig("soft", 0.5, 3.0)), "another temperature"),
        (dict(config=DistillConfig("hard", 0.5, 2.0)), "another kind, temperature"),
        (dict(mixup=0.8), "another mixing"),
        (dict(precision="bfloat16"), "another precision"),
        (
            dict(data=load_data("digits", model_input=(1, 8, 8), batch_size=32, validation="val")),
            "another data",
        ),
        (
            dict(data=load_data("digits", model_input=(1, 8, 8), batch_size=64, validation="val", seed=1)),
            "another data",
        ),
        (dict(data=load_data("digits", model_input=(1, 8, 8), batch_size=64)), "another data, images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_of_something_else_are_refused_in_one_line(tmp_path, change, says):
    given = {"teacher": Counted(), "data": digits_data(), "config": SOFT}
    task(tmp_path, **given)
    with pytest.raises(ValueError, match=f"teacher_cache: .* is of {says}; name another folder") as caught:
        task(tmp_path, **{**given, **change})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_cached_is_refused(tmp_path):
    data, config = digits_data(), dataclasses.replace(SOFT, features=1.0)
    with pytest.raises(ValueError, match=r"distill features 1\.0 must be 0"):
        task(tmp_path / "a", Counted(), data, config)
    with pytest.raises(ValueError, match="needs a teacher, but distill kind is 'none'"):
        task(tmp_path / "a", Counted(), data, DistillConfig("none"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        task(tmp_path / "file", Counted(), data, SOFT)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        task(tmp_path / "b", Counted(), data, SOFT)
    plain = DataLoader(TensorDataset(data.train.images, data.train.labels), 64)
    with pytest.raises(ValueError, match="train_loader does not say which image and view it shows"):
        compress(digits_model(), plain, data.val, 0.6, config=SHORT, teacher_cache=tmp_path / "c")


def test_two_runs_that_fill_one_epoch_keep_the_rows_of_both(tmp_path):
    first, second = (TeacherCache(tmp_path, {}, images=4, classes=3) for _ in range(2))
    rows = torch.eye(3).mul(0.7) + 0.1
    first.put(0, torch.tensor([0, 1]), rows[:2])
    second.put(0, torch.tensor([1, 3]), rows[1:])
    first.flush()
    second.flush()
    third = TeacherCache(tmp_path, {}, images=4, classes=3)
    values, classes = third.get(0, torch.tensor([0, 1, 3]))
    assert classes[:, 0].tolist() == [0, 1, 2] and third.get(0, torch.tensor([2])) is None
    assert values.dtype == torch.float16 and not list(tmp_path.glob("*.part"))


def test_a_broken_file_is_one_line_and_a_full_disk_a_warning(tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path, {}, images=4, classes=3)
    (tmp_path / "epoch-00002.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"cannot read .*epoch-00002\.safetensors: .*; delete it"):
        cache.get(2, torch.tensor([0]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uvc.io.files.save_file", full)
    cache = TeacherCache(tmp_path, {}, images=4, classes=3)
    cache.put(0, torch.tensor([0]), torch.tensor([[0.2, 0.3, 0.5]]))
    with pytest.warns(UserWarning, match=r"epoch-00000\.safetensors cannot be written: No space left"):
        cache.flush()


def test_answers_that_are_not_finite_are_not_kept(tmp_path):
    cache = TeacherCache(tmp_path, {}, images=4, classes=3)
    with pytest.raises(RuntimeError, match="the teacher's answers are not finite"):
        cache.put(0, torch.tensor([0]), torch.full((1, 3), torch.nan))


def test_a_folder_of_images_may_move_and_workers_may_change(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "one" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "one" / split / name / f"{i}.png")

    def load(place, workers, **views):
        options = dict(model_input=(1, 8, 8), batch_size=4, workers=workers, views=DataConfig(**views))
        return load_data(tmp_path / place, **options)

    teacher, student = Counted(2), Student(2)
    losses = []
    for place, workers in (("one", 0), ("two", 2)):
        if place == "two":
            (tmp_path / "one").rename(tmp_path / "two")
        data = load(place, workers)
        kept = task(tmp_path / "cache", teacher, data, SOFT)
        losses.append([float(kept(student, *batch)["loss"]) for _ in range(2) for batch in data.train])
        kept.end_epoch()
    assert losses[0] == losses[1] and teacher.asked == 4
    with pytest.raises(ValueError, match="is of another data"):
        task(tmp_path / "cache", teacher, load("two", 0, reprob=0.5), SOFT)


def test_a_folder_of_other_answers_is_refused_before_any_training(tmp_path):
    data, model = digits_data(), digits_model()
    task(tmp_path, Counted(), data, SOFT)
    before = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match="is of another data"):
        compress(model, digits(seed=1).train, data.val, 0.6, config=SHORT, teacher_cache=tmp_path)
    assert torch.equal(model.head.weight, before)

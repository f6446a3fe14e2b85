"""The losses, against their formulas written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from uvc.config import Config, DistillConfig
from uvc.training.losses import Classification, Distillation, Mixing


class Fixed(nn.Module):
    """Returns what it was given."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs if len(outputs) > 1 else outputs[0]

    def forward(self, images):
        return self.outputs


torch.manual_seed(0)
A, B, T = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
LABELS = torch.tensor([0, 2, 1, 1])


def cross_entropy(logits, labels):
    return sum(
        math.log(sum(math.exp(v) for v in row)) - row[i]
        for row, i in zip(logits.tolist(), labels.tolist(), strict=True)
    ) / len(labels)


def kl(student, teacher, t):
    total = 0.0
    for s, p in zip((student / t).softmax(-1).tolist(), (teacher / t).softmax(-1).tolist(), strict=True):
        total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(s, p, strict=True))
    return t * t * total / len(student)


def test_classification_is_the_mean_cross_entropy():
    out = Classification()(Fixed(A), None, LABELS)
    assert float(out["loss"]) == pytest.approx(cross_entropy(A, LABELS))
    assert out["output"] is A


def test_soft_distillation_is_batch_mean_kl_times_temperature_squared():
    out = Distillation(Fixed(T), DistillConfig("soft", 0.3, 4.0))(Fixed(A), None, LABELS)
    assert float(out["loss"]) == pytest.approx(0.7 * cross_entropy(A, LABELS) + 0.3 * kl(A, T, 4.0))


def test_soft_distillation_of_the_teacher_itself_costs_nothing():
    assert float(
        Distillation(Fixed(T), DistillConfig("soft", 1.0, 2.0))(Fixed(T), None, LABELS)["loss"]
    ) == pytest.approx(0, abs=1e-12)


def test_hard_distillation_learns_the_teachers_argmax():
    out = Distillation(Fixed(T), DistillConfig("hard", 0.5))(Fixed(A), None, LABELS)
    assert float(out["loss"]) == pytest.approx(
        0.5 * cross_entropy(A, LABELS) + 0.5 * cross_entropy(A, T.argmax(-1))
    )


def test_a_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels():
    out = Distillation(Fixed(T), DistillConfig("soft", 0.5, 1.0))(Fixed(A, B), None, LABELS)
    assert float(out["loss"]) == pytest.approx(0.5 * cross_entropy(A, LABELS) + 0.5 * kl(B, T, 1.0))
    torch.testing.assert_close(out["output"], (A + B) / 2)


class Headed(nn.Module):
    """A classifier `head` on given features [B, D], scaled by a weight."""

    def __init__(self, features, head):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.features, self.head = features, head

    def forward(self, images):
        return self.head(self.scale * self.features)


def test_feature_distillation_adds_the_relative_squared_distance_of_what_the_head_reads():
    x, y = torch.randn(2, 4, 6, dtype=torch.float64)
    head = nn.Linear(6, 3, dtype=torch.float64)
    model, teacher = Headed(x, head), Headed(y, head)
    config = DistillConfig("soft", 0.3, 4.0)
    plain = Distillation(teacher, config)(model, None, LABELS)["loss"]
    both = Distillation(teacher, replace(config, features=0.7))(model, None, LABELS)["loss"]
    distance = float(((x - y) ** 2).mean() / (y**2).mean())
    assert (both - plain).item() == pytest.approx(0.7 * distance)
    (grad,) = torch.autograd.grad(both - plain, model.scale)
    assert float(grad) == pytest.approx(0.7 * float((2 * x * (x - y)).mean() / (y**2).mean()))
    assert not model.head._forward_pre_hooks


def test_feature_distillation_refuses_a_teacher_of_another_width_and_a_negative_weight():
    model = Headed(torch.randn(4, 6), nn.Linear(6, 3))
    teacher = Headed(torch.randn(4, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"\[4, 6\].*\[4, 8\]; take a teacher as wide"):
        Distillation(teacher, DistillConfig(features=1.0))(model, None, LABELS)
    with pytest.raises(ValueError, match=r"distill features: -1\.0; it must be 0 or"):
        DistillConfig(features=-1.0)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'medium'; known are 'none', 'soft', 'hard'"):
        DistillConfig("medium")


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_in_bfloat16_products_round_and_losses_do_not(features):
    torch.manual_seed(1)
    images, heads = torch.randn(4, 6), [Headed(torch.randn(4, 6), nn.Linear(6, 3)) for _ in range(2)]
    for head in heads:
        head.scale.data = head.scale.data.float()
    config = DistillConfig("soft", 0.3, 4.0, features)
    exact, rough = (
        Distillation(heads[0], config, 0.1, precision)(heads[1], images, LABELS)
        for precision in ("float32", "bfloat16")
    )
    rounded = heads[1].features.bfloat16() @ heads[1].head.weight.bfloat16().T
    torch.testing.assert_close(
        rough["output"], (rounded.float() + heads[1].head.bias.bfloat16().float()), rtol=0.01, atol=0.01
    )
    assert rough["output"].dtype == rough["loss"].dtype == torch.float32
    assert not torch.equal(rough["output"], exact["output"])
    assert rough["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.02)


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(ValueError, match="precision: 'float8'; known are 'float32', 'bfloat16'"):
        Config(precision="float8")


def images_and_labels(count):
    """Images whose pixels all are the image's number, and labels of 5 classes."""
    return torch.arange(count).float()[:, None, None, None].expand(count, 1, 8, 8), torch.arange(count) % 5


def test_without_alphas_a_batch_is_left_as_it_is():
    images, labels = images_and_labels(5)
    mixing = Mixing(Config(), 5)
    assert not mixing and mixing(images, labels) == (images, labels)


def test_mixup_blends_pairs_of_images_and_their_labels_by_the_same_share():
    np.random.seed(0)
    images, labels = images_and_labels(6)
    mixed, soft = Mixing(Config(mixup=0.8), 5)(images, labels)
    for i in range(6):
        # Image i is the number i: with share s of itself it is s i + (1 - s) (5 - i).
        share = (float(mixed[i].mean()) - (5 - i)) / (2 * i - 5)
        wanted = share * torch.eye(5)[labels[i]] + (1 - share) * torch.eye(5)[labels[5 - i]]
        assert 0 < share < 1
        torch.testing.assert_close(soft[i], wanted, atol=1e-5, rtol=0)
    assert torch.equal(images, images_and_labels(6)[0])


def test_cutmix_pastes_a_patch_and_labels_count_its_area():
    np.random.seed(3)
    images, labels = images_and_labels(4)
    mixed, soft = Mixing(Config(cutmix=1.0), 5)(images, labels)
    own = (mixed[0] == 0).double().mean()
    assert 0 < own < 1 and set(mixed[0].unique().tolist()) == {0.0, 3.0}
    torch.testing.assert_close(soft[0], torch.tensor([own, 0, 0, 1 - own, 0], dtype=torch.float32))


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("alphas", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_the_last_of_an_odd_number_of_images_stays_as_it_is(count, alphas):
    images, labels = images_and_labels(count)
    mixed, soft = Mixing(Config(**alphas), 5)(images, labels)
    assert mixed.shape == images.shape and soft.shape == (count, 5)
    assert torch.equal(mixed[-1], images[-1]) and torch.equal(soft[-1], torch.eye(5)[labels[-1]])
    torch.testing.assert_close(soft.sum(1), torch.ones(count))


@pytest.mark.parametrize("count", [1, 6, 7])
def test_soft_labels_are_mixed_as_the_classes_they_stand_for(count):
    images, labels = images_and_labels(count)
    found = []
    for given in (labels, torch.eye(5)[labels]):
        np.random.seed(4)
        found.append(Mixing(Config(mixup=0.8, cutmix=1.0), 5)(images, given))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="cutmix: -1; it must be 0 or a positive number"):
        Config(cutmix=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_are_learnt_with_and_without_smoothing(smoothing):
    soft = torch.rand(4, 3, dtype=torch.float64).softmax(-1)
    wanted = -(((1 - smoothing) * soft + smoothing / 3) * A.log_softmax(-1)).sum(-1).mean()
    assert float(Classification(smoothing)(Fixed(A), None, soft)["loss"]) == pytest.approx(float(wanted))

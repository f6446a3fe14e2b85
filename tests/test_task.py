"""The losses, against their formulas written out."""

import math

import pytest
import torch
from torch import nn

from uvc.config import DistillConfig
from uvc.task import Classification, Distillation


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


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'medium'; known are 'none', 'soft' and 'hard'"):
        Distillation(Fixed(T), DistillConfig("medium"))

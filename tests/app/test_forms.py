"""Which form is faster is measured, and nothing becomes slower by it."""

import pytest
import torch
from oracle import error, images, small_vit, stored, structures

import uvc
from uvc.app import forms
from uvc.app.forms import choose
from uvc.compaction import forms_of


def small(case="random at keep 0.5"):
    model = small_vit()
    return uvc.compact(uvc.apply_structure(model, structures(model)[case])).eval()


def clock(monkeypatch, half: dict[str, float], whole: dict[str, float]) -> None:
    """Times by form: of a block's half, and of a model by the form of its first block."""

    def ms(model, call, device):
        return half[model.form] if hasattr(model, "form") else whole[forms_of(model)[0]]

    monkeypatch.setattr(forms, "_ms", ms)


def test_the_faster_form_of_each_block_is_taken(monkeypatch):
    model = small()
    clock(monkeypatch, {"grouped": 2.0, "padded": 1.0}, {"grouped": 8.0, "padded": 6.0})
    choice = choose(model, batch=2)
    assert forms_of(choice.model) == ("padded",) * 3 and forms_of(model) == ("grouped",) * 3
    assert (choice.before_ms, choice.after_ms, choice.ratio) == (8.0, 6.0, 0.75)
    assert choice.after_macs > choice.before_macs == uvc.cost(model).macs
    assert all(t.chosen == "padded" and t.macs["padded"] > t.macs["grouped"] for t in choice.blocks)
    x = images(model)
    assert error(choice.model(x), model(x)) < 1e-5


@pytest.mark.parametrize("whole", [8.0, 9.0], ids=["as fast", "slower"])
def test_a_model_that_would_be_no_faster_stays(monkeypatch, whole):
    model = small()
    clock(monkeypatch, {"grouped": 2.0, "padded": 1.0}, {"grouped": 8.0, "padded": whole})
    choice = choose(model)
    assert stored(choice.model) == stored(model) and choice.ratio == 1.0
    assert choice.after_ms == choice.before_ms == 8.0


@pytest.mark.parametrize("case", ["every block skipped", "dense"])
def test_where_the_forms_are_one_nothing_is_measured(case):
    if case == "dense":
        model = uvc.compact(small_vit(embed_dim=32))  # heads of 8 dims
    else:
        model = small(case)
    choice = choose(model.train(), rounds=3)
    assert [t.chosen for t in choice.blocks] == [None] * 3 and choice.ratio == 1.0
    assert choice.model.training and model.training


def test_a_model_in_full_size_is_refused():
    with pytest.raises(ValueError, match="choose: the model is not compacted"):
        choose(small_vit())


def test_the_clock_runs():
    choice = choose(small().to(torch.float64), rounds=3)
    assert all(min(t.ms.values()) > 0 for t in choice.blocks) and choice.before_ms > 0

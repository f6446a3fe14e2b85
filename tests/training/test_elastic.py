"""One model for several budgets: nested, each met, switched without a copy, saved as one folder, resumed."""

import copy
import dataclasses
import functools
import json
import re
from itertools import pairwise

import pytest
import torch
from cli_runs import SHORT, summary
from oracle import TOLERANCE, error
from test_compress import CONFIG, digits_data, digits_model
from test_interrupted import StopAt

import uvc
from uvc import cli
from uvc.config import SolverConfig
from uvc.elastic import make_elastic, structures_of
from uvc.io.serialization import describe
from uvc.solver import Joint
from uvc.training.compress import compress, train_teacher
from uvc.training.logger import RunLog
from uvc.training.losses import Distillation
from uvc.training.signals import Stopped, stop_on_signals

BUDGETS = (0.8, 0.6, 0.45, 0.3)
STEPS = dataclasses.replace(CONFIG, search_epochs=3, post_epochs=1)


@functools.cache
def trained():
    model, data = digits_model(), digits_data()
    train_teacher(model, data.train, data.val, dataclasses.replace(CONFIG, teacher_epochs=8), RunLog(None))
    return model


def run(out=None, stop_at=None, resume=False):
    data = digits_data()
    train = StopAt(data.train, stop_at) if stop_at else data.train
    with stop_on_signals():
        return compress(
            copy.deepcopy(trained()), train, data.val, budget=BUDGETS, config=STEPS, out=out, resume=resume
        )


@functools.cache
def whole(folder):
    return run(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture
def result(folder):
    found = whole(folder)
    uvc.set_budget(found.model, BUDGETS[0])
    return found


def images():
    return digits_data().val.images[:64]


def test_structures_are_nested_and_each_meets_its_budget(result):
    assert tuple(result.structures) == BUDGETS and result.structure == result.structures[0.8]
    for larger, smaller in pairwise(result.structures.values()):
        assert larger.contains(smaller) and not smaller.contains(larger)
    unit = max(map(max, uvc.costs.prices(result.model, "macs")[3:]))
    for budget, structure in result.structures.items():
        macs = uvc.cost(result.model, structure).macs
        assert budget * result.dense_cost.macs - unit < macs <= budget * result.dense_cost.macs


def test_every_budget_learns_and_no_weight_of_it_is_stuck_at_zero(result):
    assert all(result.final_scores[b] > result.teacher_score - 15 for b in BUDGETS)
    assert result.final_scores[0.3] > result.before_post_scores[0.3]
    assert [e["budget"] for e in result.history if e["phase"] == "harden"] == list(BUDGETS)
    # A neuron whose rows and columns are zero has no gradient: what a smaller budget lost is put back.
    for block, kept in zip(result.model.blocks, result.structure.blocks, strict=True):
        if kept.mlp and kept.neurons:
            rows = block.mlp.fc1.weight.detach()[list(kept.neurons)].norm(dim=1)
            assert float(rows.min()) > 1e-4


def test_switching_back_and_forth_is_bit_equal_and_copies_no_weight(result):
    model, x = result.model, images()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        first = {budget: uvc.set_budget(model, budget)(x) for budget in BUDGETS}
        again = {budget: uvc.set_budget(model, budget)(x) for budget in reversed(BUDGETS)}
    assert all(torch.equal(first[budget], again[budget]) for budget in BUDGETS)
    assert not torch.equal(first[0.8], first[0.3])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_what_follows_from_a_structure_is_derived_once_and_goes_into_no_copy(result, monkeypatch):
    applied, x = [], images()
    monkeypatch.setattr(
        uvc.elastic, "apply_structure", lambda *args: applied.append(args[1]) or uvc.apply_structure(*args)
    )
    model = copy.deepcopy(result.model)
    with torch.inference_mode():
        first = {budget: uvc.set_budget(model, budget)(x) for budget in BUDGETS}
    assert applied == list(result.structures.values())
    uvc.apply_structure(model, uvc.Structure.dense(model))
    for budget in reversed(BUDGETS):
        assert torch.equal(uvc.set_budget(model, budget)(x), first[budget])
        assert uvc.structure_of(model) == result.structures[budget]
    assert len(applied) == len(BUDGETS)
    model(x).sum().backward()  # though the structures were derived in inference mode
    other = copy.deepcopy(model)
    uvc.set_budget(other, BUDGETS[0]), uvc.set_budget(other.to("meta"), BUDGETS[0])
    assert len(applied) == len(BUDGETS) + 2 and other.blocks[0].mlp.kept(torch.device("meta")).flat.is_meta
    # Given other structures, it forgets.
    make_elastic(model, {0.8: result.structures[0.3]})
    assert uvc.structure_of(model) == result.structures[0.3]


def test_compiled_blocks_are_traced_by_kind_and_not_again_at_a_switch(result):
    graphs, model, x = [], copy.deepcopy(result.model), images()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    right = {budget: uvc.set_budget(model, budget)(x) for budget in BUDGETS}
    for block in model.blocks:
        block.compile(backend=count)
    seen = []
    for budget in (*BUDGETS, *BUDGETS, *reversed(BUDGETS)):
        assert error(uvc.set_budget(model, budget)(x), right[budget]) < TOLERANCE[x.dtype]
        seen.append(len(graphs))
    print(f"graphs after each pass: {seen}")
    assert seen[len(BUDGETS) - 1] == seen[-1] <= 4


def test_one_folder_gives_the_switchable_model_and_a_compacted_one_of_each_budget(result, folder):
    model, x = uvc.load(folder), images()
    assert structures_of(model) == result.structures and uvc.structure_of(model) == result.structure
    for budget in BUDGETS:
        uvc.set_budget(result.model, budget), uvc.set_budget(model, budget)
        small = uvc.load(folder, budget=budget)
        with torch.no_grad():
            right = result.model(x)
            assert torch.equal(model(x), right)
            assert error(small(x), right) < TOLERANCE[x.dtype]
        assert uvc.cost(small) == uvc.cost(uvc.compact(model)) and not structures_of(small)
    # Saved at another budget it is the same folder.
    assert json.loads(json.dumps(describe(model))) == json.loads((folder / "config.json").read_text())


def test_unknown_budgets_are_one_line(result, folder, tmp_path):
    known = re.escape("0.8, 0.6, 0.45, 0.3")
    with pytest.raises(ValueError, match=rf"budget: 0\.5 is none of this model's, {known}"):
        uvc.set_budget(result.model, 0.5)
    with pytest.raises(ValueError, match=rf"budget: 0\.5 is none of this model's, {known}"):
        uvc.load(folder, budget=0.5)
    uvc.save(uvc.compact(result.model), tmp_path)
    for one in (lambda: uvc.load(tmp_path, budget=0.5), lambda: uvc.set_budget(digits_model(), 0.5)):
        with pytest.raises(ValueError, match=r"budget: 0\.5, but this model has only one structure"):
            one()


def test_structures_that_are_not_nested_are_refused(tmp_path):
    model = uvc.convert(digits_model())
    some = {0.5: uvc.Structure.random(model, 0.5), 0.4: uvc.Structure.random(model, 0.5, seed=1)}
    with pytest.raises(ValueError, match=r"the structure at 0\.4 keeps what that at 0\.5 does not"):
        make_elastic(model, some)
    assert not structures_of(model)
    make_elastic(model, {0.5: some[0.5], 1.0: uvc.Structure.dense(model)})
    uvc.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["structures"]["0.4"] = some[0.4].to_data()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"keeps what that at 0\.5 does not"):
        uvc.load(tmp_path)


@pytest.mark.parametrize("at", [3, 20, 15 + 11, 40, 55, 60, 66])
def test_a_resumed_run_ends_where_an_unbroken_one_does(result, tmp_path, at):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=at)
    resumed = run(tmp_path, resume=True)
    assert resumed.structures == result.structures and resumed.final_scores == result.final_scores
    assert resumed.before_post_scores == result.before_post_scores
    a, b = result.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_step_adds_the_gradients_of_two_budgets_and_asks_the_teacher_once():
    data, asked = digits_data(), []
    model, teacher = uvc.convert(digits_model()), digits_model()
    teacher.register_forward_pre_hook(lambda *_: asked.append(1))
    dense = uvc.Structure.dense(model)
    nested = {1.0: dense}
    for budget, neurons in ((0.9, 0.75), (0.8, 0.5), (0.7, 0.25)):
        nested[budget] = uvc.Structure.uniform(model, neurons=neurons)
    make_elastic(model, nested)
    joint, task = Joint(model, nested), Distillation(teacher, CONFIG.distill)
    x, labels = data.train.images[:8], data.train.labels[:8]
    for other in (0.9, 0.8, 1.0, 0.9):
        for turn in range(joint.passes):
            joint.turn(turn)
            task(model, x, labels)["loss"].backward()
        found = model.blocks[0].mlp.fc1.weight.grad.clone()
        model.zero_grad()
        right = torch.zeros_like(found)
        for budget in (0.7, other):
            uvc.set_budget(model, budget)
            task(model, x, labels)["loss"].backward()
            right += model.blocks[0].mlp.fc1.weight.grad
            model.zero_grad()
        assert error(found, right) < TOLERANCE[found.dtype]
        joint.step(None)
        assert uvc.structure_of(model) == dense
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(budget=(0.5, 0.7)), r"budget: 0\.5, 0\.7 must descend"),
        (dict(budget=(0.5, 0.5)), r"budget: 0\.5, 0\.5 must descend"),
        (dict(budget=(1.2, 0.5)), r"budget: 1\.2 is not a fraction"),
        (dict(budget=(0.5, 0.0)), r"budget: 0\.0 is not a fraction"),
        (dict(budget=(0.5,)), r"budget: a list of one, 0\.5"),
        (dict(budget=()), "budget: a list of one, or none"),
        (dict(budget=({"macs": 0.5}, 0.4)), "among several; those are fractions of one metric"),
        (dict(budget=(0.5, 1e-4)), r"budget: 0\.0001 is below .* smallest reachable macs budget"),
        (dict(solver=SolverConfig(method="published")), "'published' finds one structure"),
        (dict(solver=SolverConfig(tokens=1)), "several budgets keep all"),
        (dict(search_epochs=0), "search_epochs: 0 of 15 batches are fewer steps than 2 budgets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_several_budgets_cannot_be_is_refused_before_any_training(arguments, says):
    model, data = digits_model(), digits_data()
    before, budget = model.head.weight.detach().clone(), arguments.pop("budget", (0.7, 0.5))
    with pytest.raises(ValueError, match=says) as caught:
        compress(model, data.train, data.val, budget, config=dataclasses.replace(CONFIG, **arguments))
    assert "\n" not in str(caught.value) and torch.equal(model.head.weight, before)


def test_the_command_line_compresses_to_several_budgets_and_evaluates_each(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.run(["compress", "--out", str(out), *SHORT, "--budget", "0.7,0.5,0.33"]) == 0
    shown, found = capsys.readouterr().out, summary(out)
    assert [row["budget"] for row in found["budgets"]] == found["budget"] == [0.7, 0.5, 0.33]
    assert all(row["macs"] <= row["budget"] * found["dense_macs"] for row in found["budgets"])
    assert found["final_macs"] == found["budgets"][0]["macs"]
    assert all(f"budget {budget:g}" in shown for budget in (0.7, 0.5, 0.33))
    for row in found["budgets"]:
        assert cli.run(["eval", str(out), "--budget", str(row["budget"])]) == 0
        said = capsys.readouterr().out
        assert f"top-1 {row['final_top1']:.2f} %" in said and f"MACs {row['macs']:,}" in said
    assert cli.run(["eval", str(out), "--budget", "0.4"]) == 2
    assert "0.4 is none of this model's, 0.7, 0.5, 0.33" in capsys.readouterr().err
    assert cli.run(["report", str(out)]) == 0

"""Training under torch.compile: the structures of a run without it, and few compilations."""

import dataclasses
import shutil

import pytest
import torch
from gang import gang
from oracle import error
from test_compress import digits_model
from test_processes import REACH, SHORT, digits, farthest, watch, weights
from torch._dynamo.backends.registry import lookup_backend, register_backend

from uvc.layers import convert
from uvc.structure import Structure, apply_structure, structure_of
from uvc.training import compiling
from uvc.training.compress import compress

GRAPHS = []


def count(graph, inputs):
    """A backend that lists the graphs that it is given."""
    GRAPHS.append(graph)
    return lookup_backend("aot_eager")(graph, inputs)


def counting():
    """The list of graphs that the backend "counting" is given from now on."""
    torch._dynamo.reset()
    if "counting" not in torch.compiler.list_backends():
        register_backend(count, name="counting")
    GRAPHS.clear()
    return GRAPHS


def run(backend, epochs, changes):
    """A run: structure after each search step, weights, compilations and graph breaks."""
    found, seen, data = counting(), [], digits()
    watch(lambda self: seen.append(structure_of(self.model).to_json()))
    config = dataclasses.replace(SHORT, search_epochs=epochs, compile=backend, **changes)
    result = compress(digits_model(), data.train, data.val, 0.5, config=config)
    assert all(block._compiled_call_impl is None for block in result.model.blocks)
    return seen, weights(result), len(found), dict(torch._dynamo.utils.counters["graph_break"])


def test_a_search_has_its_structures_and_compiles_few_kinds_of_blocks():
    ((plain, its, *_),) = gang(1, run, None, 8, {})
    ((seen, found, many, breaks),) = gang(1, run, "counting", 8, {})
    print(f"{len(set(seen))} structures, {many} compilations")
    assert seen == plain and farthest(found, its) < 0.05 * REACH
    assert len(set(seen)) > 10 and many <= 16 and not breaks


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_search_under_inductor_has_the_structures_of_one_without():
    ((plain, its, *_),) = gang(1, run, None, 8, {})
    ((seen, found, _, breaks),) = gang(1, run, "inductor", 8, {}, seconds=800)
    print(f"{len(set(seen))} structures, farthest weight {farthest(found, its):.1e}")
    assert seen == plain and farthest(found, its) < 0.05 * REACH and not breaks


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="whole"),
        pytest.param({"grad_checkpointing": True, "accumulate": 2}, id="parts", marks=SLOW),
    ],
)
def test_two_processes_compile_and_have_the_structures_of_one_that_does_not(changes):
    (alone,), ranks = gang(1, run, None, 2, {}), gang(2, run, "counting", 2, changes)
    assert ranks[0][0] == ranks[1][0] == alone[0]
    assert farthest(ranks[0][1], ranks[1][1]) == 0 and farthest(ranks[0][1], alone[1]) < 0.05 * REACH
    assert ranks[0][2] == ranks[1][2] <= 6 and not ranks[0][3]


def test_spread_processes_compile_and_train_as_they_do_without_to_the_bit():
    plain, ranks = gang(2, run, None, 8, {"fsdp": True}), gang(2, run, "counting", 8, {"fsdp": True})
    print(f"{len(set(ranks[0][0]))} structures, {ranks[0][2]} compilations")
    for one, its in zip(ranks, plain, strict=True):
        assert one[0] == its[0] and farthest(one[1], its[1]) == 0
        assert len(set(one[0])) > 10 and one[2] <= 16 and not one[3]


def test_past_the_limit_blocks_run_as_they_are(monkeypatch):
    monkeypatch.setattr(compiling, "KINDS", 2)
    found, model, images = counting(), convert(digits_model()).train(), torch.randn(4, 1, 8, 8)
    compiled = compiling.Compiled(model, "counting")
    for attn, mlp in ((False, False), (True, False), (False, True)):
        apply_structure(model, Structure.random(model, 0.6, seed=0))
        model.blocks[0].set_skip(attn, mlp)
        expected = model(images)
        with compiled.step():
            assert error(model(images), expected) < 1e-6
    assert len(found) == 2


def test_one_code_serves_all_counts_of_kept_dims_and_neurons():
    found, model, images = counting(), convert(digits_model()).train(), torch.randn(4, 1, 8, 8)
    compiled = compiling.Compiled(model, "counting")
    for neurons in range(90, 5, -5):
        for block in model.blocks:
            block.mlp.set_kept(torch.arange(96) < neurons + block.attn.num_heads)
        with compiled.step():
            model(images).sum().backward()
    assert len(found) <= 2  # of the first count, and of all


def test_an_unknown_backend_is_refused_in_one_line():
    data, config = digits(), dataclasses.replace(SHORT, compile="inductive")
    with pytest.raises(
        ValueError, match=r"^compile: 'inductive' is no backend of torch.compile; use one of .*inductor"
    ):
        compress(digits_model(), data.train, data.val, 0.5, config=config)

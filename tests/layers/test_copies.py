"""Copies, pickles, moves and state dicts, in every order: the structure stays and outputs are right."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from oracle import MODELS, error, images, small_vit, structures

import uvc
from uvc.structure import Structure

X = (2, 3, 16, 16)


def pruned(name: str = "vit") -> torch.nn.Module:
    model = MODELS[name]().eval()
    return uvc.apply_structure(model, structures(model)["random at keep 0.5"])


STATES = {
    "timm's": lambda name: MODELS[name]().eval(),
    "converted": lambda name: uvc.convert(MODELS[name]()).eval(),
    "pruned": pruned,
    "pruned with fewer tokens": lambda name: with_tokens(pruned(name)),
    "compacted": lambda name: uvc.compact(pruned(name)),
}


def with_tokens(model: torch.nn.Module) -> torch.nn.Module:
    return uvc.apply_structure(model, uvc.structure_of(model).with_tokens(model, 0.5))


def through_torch_save(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "torch.save of a copy that has run": lambda model: (model(images(model)), through_torch_save(model))[1],
}


@pytest.mark.parametrize("name", ["vit", "packed swiglu", "t2t performer"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_and_keeps_the_same(how, state, name):
    model = STATES[state](name)
    x = images(model)
    again = COPIES[how](model)
    assert torch.equal(again(x), model(x))
    assert uvc.structure_of(again) == uvc.structure_of(model)
    assert uvc.cost(again) == uvc.cost(model)
    # Nothing is shared: a copy can be given another structure.
    if state != "compacted":
        uvc.apply_structure(again, Structure.dense(again))
        assert uvc.structure_of(again) != uvc.structure_of(model) or "pruned" not in state


def test_a_copy_that_is_trained_leaves_its_original_alone():
    model, x = pruned(), torch.randn(X)
    before, again = model(x), through_torch_save(model).train()
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(model(x), before) and not torch.equal(again.eval()(x), before)


def test_the_index_tensors_are_in_no_file():
    model, plain = pruned(), small_vit()
    sizes = []
    for one in (model, plain):
        file = io.BytesIO()
        torch.save(one, file)
        sizes.append(len(file.getvalue()))
    masks = sum(b.attn.kept_qk.numel() * 2 + b.mlp.kept_neurons.numel() for b in model.blocks)
    assert model.blocks[0].attn.__getstate__()["_kept"] is None
    assert sizes[0] - sizes[1] < 3 * masks + 20_000


def test_gates_of_a_search_do_not_stand_in_the_way_of_a_copy():
    model, x = uvc.convert(small_vit()).eval(), torch.randn(X)
    gates = (torch.tensor([0.5, 0.7], requires_grad=True) * 2).unbind()
    model.blocks[0].set_gates(*gates)
    for how in COPIES.values():
        assert torch.equal(how(model)(x), model(x))


MOVES = {
    "apply": lambda model, weights, structure: uvc.apply_structure(model, structure),
    "load": lambda model, weights, structure: load(model, weights),
    "assign": lambda model, weights, structure: load(model, weights, assign=True),
    "double": lambda model, weights, structure: model.double(),
    "convert": lambda model, weights, structure: uvc.convert(model),
}


def load(model: torch.nn.Module, weights: dict, **how) -> torch.nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, **how)
    return model


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["apply", "load", "double", "convert"])), ids="-".join
)
@pytest.mark.parametrize("loading", ["load", "assign"])
@pytest.mark.parametrize("start", ["cpu", "meta"])
def test_weights_structure_and_dtype_come_in_any_order(start, loading, order):
    if start == "meta" and loading == "load":
        pytest.skip("weights on meta can only be assigned to")
    torch.manual_seed(1)
    source = small_vit().double().eval()
    structure = structures(source)["random at keep 0.5"]
    x = torch.randn(X, dtype=torch.float64)
    weights = source.state_dict()
    with torch.device(start):
        model = small_vit().eval()
    for move in order:
        model = MOVES[loading if move == "load" else move](model, weights, structure)
    exact = order.index("double") < order.index("load") or loading == "assign"
    expected = uvc.apply_structure(source, structure)(x)
    assert error(model(x), expected) < (1e-12 if exact else 1e-5)
    assert uvc.structure_of(model) == structure


@pytest.mark.parametrize("state", ["converted", "pruned", "compacted"])
def test_a_model_goes_to_meta_and_comes_back_empty_then_loaded(state):
    model = STATES[state]("vit")
    weights, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(X)
    expected, structure = model(x), uvc.structure_of(model)
    model.to("meta")
    if state != "compacted":
        assert model(x.to("meta")).shape == expected.shape
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    assert torch.equal(model(x), expected) and uvc.structure_of(model) == structure


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state", STATES)
def test_a_dtype_move_after_a_run_keeps_structure_and_outputs(state, dtype):
    model, x = STATES[state]("vit"), torch.randn(X)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and error(found.float(), expected) < 0.1


def test_functional_call_uses_the_tensors_given():
    model, x = pruned().double(), torch.randn(X, dtype=torch.float64)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(doubled)
    assert error(torch.func.functional_call(model, doubled, (x,)), expected(x)) < 1e-12


def _run(model, x, queue):
    queue.put(model(x).detach().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("state", ["pruned", "compacted"])
def test_a_process_that_is_spawned_gets_the_model(state):
    model, x = STATES[state]("vit"), torch.randn(X)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_run, args=(model, x, queue))
    process.start()
    found = queue.get()
    process.join(60)
    assert error(torch.tensor(found), model(x)) < 1e-6


def test_a_model_in_shared_memory_still_computes():
    model, x = pruned(), torch.randn(X)
    expected = model(x)
    assert torch.equal(model.share_memory()(x), expected)

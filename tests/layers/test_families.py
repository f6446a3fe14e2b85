"""What a layer offers to prune is said once, and everything that prunes, counts or checks follows it."""

import copy
from dataclasses import replace

import pytest
import torch
from oracle import MODELS as SAVED
from oracle import absent, error, gradient_error, gradients, images, small_vit, structures
from served import gated
from torch.utils.data import DataLoader, TensorDataset

import uvc
from uvc.config import Config
from uvc.constraints import reachable
from uvc.costs import count_macs
from uvc.structure import Structure

MODELS = {**SAVED, "gated attention": gated}
FREE = {"heads": 1, "qk": 1, "v": 1, "neurons": 1, "halves": ("attn", "mlp")}
OFFERS = {
    "vit": FREE,
    "q/k norms": {**FREE, "qk": 0},
    "norms inside": {**FREE, "heads": 0, "v": 0, "neurons": 0},
    "gated attention": FREE,
    "packed swiglu": FREE,
}
SMALLEST = {
    "q/k norms": lambda block: replace(block, qk_dims=tuple(dims[1:] for dims in block.qk_dims)),
    "norms inside": lambda block: replace(block, neurons=block.neurons[1:]),
}


@pytest.mark.parametrize("name", OFFERS)
def test_families_are_the_same_of_a_timm_a_converted_and_a_compacted_model(name):
    model = MODELS[name]()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    assert uvc.families(model) == [OFFERS[name]] * 3
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, types)
    small = uvc.compact(uvc.apply_structure(model, Structure.random(model, 0.5, seed=1)))
    assert uvc.families(model) == uvc.families(small) == [OFFERS[name]] * 3


@pytest.mark.parametrize("name", SMALLEST)
def test_a_structure_that_removes_what_is_tied_is_refused_with_the_layer_and_the_reason(name):
    model = MODELS[name]()
    first, *rest = Structure.dense(model).blocks
    structure = Structure((SMALLEST[name](first), *rest))
    half = {"q/k norms": "attn: its q/k dims", "norms inside": "mlp: its neurons"}[name]
    with pytest.raises(ValueError, match=rf"blocks\.0\.{half} must all be kept, as .*norm is a LayerNorm"):
        uvc.apply_structure(model, structure)
    assert uvc.structure_of(model) == Structure.dense(model)


def test_random_and_uniform_structures_keep_what_is_tied():
    model = MODELS["q/k norms"]()
    for structure in (Structure.random(model, 0.3, seed=2), Structure.uniform(model, 0.5, 0.5, 0.5)):
        for block in structure.blocks:
            assert 0 < len(block.heads) < 4
            assert all(dims == tuple(range(6)) for dims in block.qk_dims)
            assert any(len(dims) < 6 for dims in block.v_dims)
    model = MODELS["norms inside"]()
    for structure in (Structure.random(model, 0.3, seed=2), Structure.uniform(model, 0.5, 0.5, 0.5)):
        for block in structure.blocks:
            assert block.heads == (0, 1, 2, 3) and block.neurons == tuple(range(40))
            assert all(dims == tuple(range(6)) for dims in block.v_dims)
            assert any(len(dims) < 6 for dims in block.qk_dims)


def test_what_is_tied_counts_in_the_smallest_budget_with_all_halves_running():
    macs = [reachable(MODELS[name]())[0] for name in ("vit", "q/k norms", "norms inside")]
    assert macs[0].dense == macs[1].dense == macs[2].dense
    assert macs[0].skipped == macs[1].skipped == macs[2].skipped
    assert macs[0].thin < macs[1].thin < macs[2].thin


@pytest.mark.parametrize("name", ["q/k norms", "norms inside", "gated attention"])
def test_a_search_meets_the_budget_with_what_a_layer_offers(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    data = TensorDataset(images(model, 16), torch.randint(5, (16,)))
    loader = DataLoader(data, batch_size=8)
    config = replace(Config(), warmup_epochs=1, search_epochs=4, post_epochs=1)
    result = uvc.compress(model, loader, loader, budget=0.6, config=config)
    ratio = result.cost.macs / result.dense_cost.macs
    assert ratio <= 0.6 and (ratio > 0.55 or name == "norms inside")
    for block, offered in zip(result.structure.blocks, uvc.families(result.model), strict=True):
        if not offered["qk"]:
            assert all(len(dims) == 6 for dims in block.qk_dims)
        if not offered["neurons"]:
            assert len(block.neurons) in (0, 40)


@pytest.mark.parametrize("kind", structures(small_vit()))
def test_gated_attention_equals_the_dense_one_with_contributions_absent(kind):
    torch.manual_seed(3)
    model = gated().double()
    structure, x = structures(model)[kind], images(model, dtype=torch.float64)
    truth = absent(model, structure)(x)
    expected = gradients(model, truth)
    pruned = uvc.apply_structure(copy.deepcopy(model), structure)
    out = pruned(x)
    assert error(out, truth) < 1e-10
    assert gradient_error(gradients(pruned, out), expected) < 1e-10
    assert error(uvc.compact(pruned)(x), truth) < 1e-10
    assert uvc.cost(pruned).params == sum(p.numel() for p in uvc.compact(pruned).parameters())
    assert uvc.cost(pruned).macs == count_macs(uvc.compact(pruned), x[:1])


def test_the_published_method_refuses_what_does_not_go_one_by_one():
    model = MODELS["q/k norms"]()
    loader = DataLoader(TensorDataset(images(model, 4), torch.zeros(4, dtype=torch.int64)), batch_size=4)
    config = Config()
    config = replace(config, solver=replace(config.solver, method="published"))
    with pytest.raises(ValueError, match=r"blocks\.0: its q/k dims do not go one by one"):
        uvc.compress(model, loader, loader, budget=0.6, config=config)

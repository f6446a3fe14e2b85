"""A pruned layer whose children were changed: they are called, and right."""

import copy
import inspect
import warnings

import pytest
import timm
import torch
import uvc_kernels
from changed_children import (
    CHANGES,
    SAME_OUTPUT,
    LoRA,
    X,
    changed,
    linears,
    pruned_then_changed,
    removed_by_hooks,
    wrap,
)
from oracle import MODELS, error, gradient_error, gradients, small_vit, structures
from torch import nn

import uvc

pytestmark = pytest.mark.filterwarnings("ignore:UVC:UserWarning", "ignore::FutureWarning")

GATED = "gated" in inspect.signature(timm.layers.Attention).parameters
NEEDS_GATE = pytest.mark.skipif(not GATED, reason="the attention of this timm has no gate")


@pytest.mark.parametrize("name", ["vit", "swiglu", "packed swiglu", "glu, gate last"])
@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=NEEDS_GATE if c == "a gate" else ()) for c in CHANGES]
)
def test_changed_children_are_called_and_outputs_and_gradients_are_right(change, name):
    change, same = CHANGES[change], change in SAME_OUTPUT
    structure = structures(MODELS[name]())["random at keep 0.5"]
    x = torch.randn(X, dtype=torch.float64)
    torch.manual_seed(4)
    theirs = removed_by_hooks(changed(change, name), structure)
    torch.manual_seed(4)
    ours = pruned_then_changed(change, name)
    ours.load_state_dict(theirs.state_dict())
    expected, found = theirs(x), ours(x)
    assert error(found, expected) < 1e-10
    if not same:
        assert error(found, pruned_then_changed(lambda block: None, name)(x)) > 1e-3
    assert gradient_error(gradients(ours, found), gradients(theirs, expected)) < 1e-9


@pytest.mark.parametrize("case", structures(small_vit()))
def test_changed_children_serve_every_structure(case):
    structure = structures(small_vit())[case]
    x = torch.randn(X, dtype=torch.float64)
    ours = changed(lambda block: None)
    uvc.apply_structure(ours, structure)
    expected = ours(x)
    for block in ours.blocks:
        for half, name in linears(block):
            setattr(half, name, LoRA(getattr(half, name)))
            nn.init.zeros_(getattr(half, name).b)
    assert error(ours(x), expected) < 1e-10
    assert uvc.structure_of(ours) == structure


@pytest.mark.parametrize("mask", ["bool", "float", "causal", "one per head"])
def test_changed_children_see_attention_masks(mask):
    layer, plain = (uvc.UVCAttention(24, 4, qkv_bias=True).double() for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    qk, v = torch.rand(2, 4, 6) > 0.4
    for one in (layer, plain):
        one.set_kept(qk, v)
    layer.qkv.register_forward_hook(lambda m, i, out: out)
    arguments = {
        "bool": dict(attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()),
        "float": dict(attn_mask=torch.randn(5, 5, dtype=torch.float64)),
        "causal": dict(is_causal=True),
        "one per head": dict(attn_mask=torch.randn(2, 4, 5, 5, dtype=torch.float64)),
    }[mask]
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for fused in (True, False):
        layer.fused_attn = fused
        assert error(layer(x, **arguments), plain(x, **arguments)) < 1e-10


def test_every_hook_on_a_child_is_called():
    model, seen = pruned_then_changed(lambda block: None), set()
    names = (
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.act",
        "mlp.drop1",
        "mlp.fc2",
        "mlp.drop2",
        "attn.proj_drop",
    )
    for name in names:
        model.blocks[0].get_submodule(name).register_forward_hook(lambda *_, n=name: seen.add(n))
    model(torch.randn(X, dtype=torch.float64))
    assert seen == set(names)


def test_hooks_on_all_modules_are_called_for_children_too():
    model, seen = pruned_then_changed(lambda block: None), set()
    names = {module: name for name, module in model.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(names[module]))
    try:
        model(torch.randn(X, dtype=torch.float64))
    finally:
        handle.remove()
    assert {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2"} <= seen


def test_a_program_that_only_notes_where_it_is_leaves_the_fast_op():
    model, x = pruned_then_changed(lambda block: None), torch.randn(X, dtype=torch.float64)
    with warnings.catch_warnings(), torch.utils.module_tracker.ModuleTracker():
        warnings.simplefilter("error", UserWarning)
        model(x)


def test_what_is_called_is_said_once_and_plain_children_say_nothing(monkeypatch):
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    x = torch.randn(X, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruned_then_changed(lambda block: None)(x)
    model = pruned_then_changed(wrap(LoRA))
    with pytest.warns(UserWarning) as caught:
        model(x)
        model(x)
    end = "is a LoRA, not a plain Linear; its children are called, at the cost of the dense layer"
    assert sorted(str(w.message) for w in caught) == [f"UVCAttention: qkv {end}", f"UVCMlp: fc1 {end}"]


def test_a_removed_hook_brings_the_fast_op_back(monkeypatch):
    model, x = pruned_then_changed(lambda block: None), torch.randn(X, dtype=torch.float64)
    expected = model(x)
    handles = [
        getattr(half, name).register_forward_hook(lambda *_: None) for half, name in linears(model.blocks[0])
    ]
    assert not model.blocks[0].attn.reads_weights and not model.blocks[0].mlp.reads_weights
    for handle in handles:
        handle.remove()
    assert model.blocks[0].attn.reads_weights and model.blocks[0].mlp.reads_weights
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("compacted", [False, True], ids=["on the fly", "compacted"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_int8_runs_and_stays_near(compacted):
    model = small_vit()
    uvc.apply_structure(model, structures(model)["random at keep 0.5"]).eval()
    model = uvc.compact(model) if compacted else model
    x = torch.randn(X)
    int8 = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert 1e-4 < error(int8(x), model(x)) < 0.1
    assert uvc.structure_of(int8) == uvc.structure_of(model)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_tokens_are_ranked_through_an_adapter_as_with_merged_weights(global_pool):
    model = small_vit(global_pool=global_pool).double().eval()
    structure = structures(model)["random at keep 0.5"].with_tokens(model, 0.5)
    uvc.apply_structure(model, structure)
    merged = copy.deepcopy(model)
    for block, other in zip(model.blocks, merged.blocks, strict=True):
        adapter = block.attn.qkv = LoRA(block.attn.qkv)
        with torch.no_grad():
            other.attn.qkv.weight += adapter.b @ adapter.a
    x = torch.randn(X, dtype=torch.float64)
    assert error(model(x), merged(x)) < 1e-10


@pytest.mark.parametrize("backend", ["cuda-host"])
def test_backends_that_pack_ahead_leave_changed_layers_alone(backend):
    model, x = small_vit(), torch.randn(X)
    uvc.apply_structure(model, structures(model)["random at keep 0.5"])
    model.blocks[1].attn.qkv = LoRA(model.blocks[1].attn.qkv)
    model.blocks[2].mlp.fc2.register_forward_hook(lambda m, i, out: out * 2)
    expected = model(x)
    with uvc_kernels.backend(backend):
        assert error(model(x), expected) < 1e-5


def test_dropout_that_is_on_by_itself_drops():
    model = small_vit(proj_drop_rate=0.5).eval()
    uvc.apply_structure(model, structures(model)["random at keep 0.5"])
    layer, x = model.blocks[0].mlp, torch.randn(4, 5, 24)
    expected = layer(x)
    layer.drop1.train()
    assert error(layer(x), expected) > 0.1

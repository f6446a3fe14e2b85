"""A layer whose children were changed, where weights are read: refused by name, or right once compacted."""

import copy

import pytest
import torch
from changed_children import CHANGES, Half, LoRA, X, linears, pruned_then_changed, wrap
from oracle import error, small_vit, structures
from timm.layers import set_fast_norm
from torch import nn
from torch.nn.utils import parametrize, prune

import uvc
from uvc.layers.children import is_plain

pytestmark = pytest.mark.filterwarnings("ignore:UVC:UserWarning", "ignore::FutureWarning")

REFUSED = {
    "adapters": r"blocks\.0\.attn\.qkv is a LoRA, not a plain Linear",
    "subclasses": r"blocks\.0\.attn\.qkv is a Scaled",
    "forward functions of their own": r"blocks\.0\.attn\.qkv has a forward of its own",
    "weights of another tensor class": r"blocks\.0\.attn\.qkv has a weight that is no plain parameter",
    "forward hooks": r"blocks\.0\.attn\.qkv has hooks",
    "prune": r"blocks\.0\.attn\.qkv has a weight that is no plain parameter",
    "weight_norm by hook": r"blocks\.0\.attn\.qkv has a weight that is no plain parameter",
    "weight_norm as parametrization": r"blocks\.0\.attn\.qkv is a ParametrizedLinear",
    "inner norms": r"blocks\.0\.attn: its q/k dims must all be kept, as k_norm is a LayerNorm",
    "an activation with weights": r"blocks\.0\.mlp\.act is a PerToken with weights of its own",
    "hooks on what has no weights": r"blocks\.0\.attn\.q_norm has hooks",
}


@pytest.mark.parametrize("change", REFUSED)
def test_compacting_and_compressing_changed_children_is_refused_by_name(change, tmp_path):
    model = pruned_then_changed(CHANGES[change])
    loader = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=REFUSED[change]) as caught:
        uvc.compact(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=REFUSED[change]):
        uvc.compress(model.float(), loader, loader, out=tmp_path)


@pytest.mark.parametrize("change", ["adapters", "weight_norm as parametrization"])
def test_a_cost_that_does_not_know_the_child_is_refused_by_name(change):
    with pytest.raises(ValueError, match=REFUSED[change]):
        uvc.cost(pruned_then_changed(CHANGES[change]))


@pytest.mark.parametrize("change", ["adapters", "prune", "weight_norm by hook"])
def test_saving_weights_that_are_not_all_is_refused_by_name(change, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[change]):
        uvc.save(pruned_then_changed(CHANGES[change]), tmp_path)


def test_merged_changes_compact_to_the_same_outputs():
    model = pruned_then_changed(wrap(lambda m: prune.l1_unstructured(m, "weight", 0.4)))
    x = torch.randn(X, dtype=torch.float64)
    expected = model(x)
    for block in model.blocks:
        for half, name in linears(block):
            prune.remove(getattr(half, name), "weight")
    assert error(model(x), expected) < 1e-10
    assert error(uvc.compact(model)(x), expected) < 1e-10


@pytest.mark.parametrize("case", ["random at keep 0.5", "no heads", "no neurons"])
def test_adapters_on_a_compacted_model_work(case):
    model = small_vit().double()
    small = uvc.compact(uvc.apply_structure(model, structures(model)[case]))
    x = torch.randn(X, dtype=torch.float64)
    before = small(x)
    for block in small.blocks:
        block.attn.proj, block.mlp.fc2 = LoRA(block.attn.proj), LoRA(block.mlp.fc2)
    hooks = []
    small.blocks[0].attn.proj.register_forward_hook(lambda *_: hooks.append("proj"))
    small.blocks[0].mlp.fc2.register_forward_hook(lambda *_: hooks.append("fc2"))
    assert error(small(x), before) > 1e-3 and hooks == ["proj", "fc2"]


@pytest.mark.parametrize("how", ["hooks", "hooks on all modules", "adapters", "weights computed on the way"])
@pytest.mark.parametrize("form", ["grouped", "padded"])
def test_children_of_a_compacted_model_are_called_where_they_are_more_than_their_weights(form, how):
    model = small_vit().double()
    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]), form)
    x, seen, handle = torch.randn(X, dtype=torch.float64), set(), None
    block, before = small.blocks[0], small(x)
    names = {getattr(half, name): name for half, name in linears(block)}
    assert set(names.values()) == {"qkv", "proj", "fc1", "fc2"}
    for half, name in linears(block):
        if how == "hooks":
            getattr(half, name).register_forward_hook(lambda *_, name=name: seen.add(name))
        if how == "adapters":
            setattr(half, name, LoRA(getattr(half, name)))
        if how == "weights computed on the way":
            parametrize.register_parametrization(getattr(half, name), "weight", Half())
    if how == "hooks on all modules":
        note = lambda module, *_: seen.add(names.get(module))  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(note)
    after = small(x)
    if handle is not None:
        handle.remove()
    if how.startswith("hooks"):
        assert seen - {None} == set(names.values()) and error(after, before) < 1e-12
    else:
        assert error(after, before) > 1e-3


def test_hooks_on_blocks_attention_and_mlp_go_along_when_compacted():
    model, seen = small_vit(), []
    uvc.apply_structure(model, structures(model)["random at keep 0.5"])
    block = model.blocks[0]
    for module in (block, block.attn, block.mlp, block.norm1):
        module.register_forward_hook(lambda module, inputs, out: seen.append(type(module).__name__))
    block.attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    small = uvc.compact(model)
    small(torch.randn(X))
    assert seen == ["LayerNorm", ["attn_mask", "is_causal"], "CompactAttention", "CompactMlp", "CompactBlock"]
    assert not any(m._forward_hooks for m in small.blocks[0].origin.modules())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["grouped", "padded"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_block_that_is_read_computes_what_it_computes_called(form, training, scale):
    model = small_vit(init_values=scale)
    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]), form)
    small.train(training)
    watched = copy.deepcopy(small)
    for block in watched.blocks:
        block.mlp.register_forward_hook(lambda *_: None)
    assert all(block._is_bare() for block in small.blocks)
    assert not any(block._is_bare() for block in watched.blocks)
    x = torch.randn(X)
    outs = [m(x) for m in (small, watched)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    for (name, p), q in zip(small.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


class Twice(nn.Module):
    """Two times its input."""

    def forward(self, x):
        return 2 * x


PUT = ["ls1", "drop_path2", "attn.proj_drop", "attn.norm", "mlp.drop1", "mlp.norm", "mlp.drop2"]
REPLACED = ["norm1", "attn", "norm2", "mlp"]


@pytest.mark.parametrize("form", ["grouped", "padded"])
@pytest.mark.parametrize("path", [*PUT, *REPLACED, "ls2"])
def test_what_is_put_into_a_compacted_block_runs(form, path):
    model = small_vit(init_values=0.3 if path == "ls2" else None).double()
    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]), form)
    x, block, seen = torch.randn(X, dtype=torch.float64), small.blocks[0], []
    before = small(x)
    *half, name = path.split(".")
    new = nn.Sequential(block.get_submodule(path), Twice()) if path.startswith("norm") else Twice()
    new.register_forward_hook(lambda *_: seen.append(path))
    if path in ("attn", "mlp"):
        new.forward = lambda x, **_: 2 * x
    block.get_submodule(".".join(half)).add_module(name, new)
    assert error(small(x), before) > 1e-3 and seen == [path]


def test_a_layer_scale_that_was_removed_is_not_read():
    model = small_vit(init_values=0.3)
    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]))
    block, x = small.blocks[0], torch.randn(X)
    before = small(x)
    with torch.no_grad():
        block.attn.proj.weight *= block.ls1.gamma[:, None]
        block.attn.proj.bias *= block.ls1.gamma
    del block.ls1
    block.add_module("note", nn.Identity())
    torch.testing.assert_close(small(x), before)


@pytest.mark.parametrize("how", ["in place", "as another module"])
@pytest.mark.parametrize("path", ["attn", "mlp", "norm1"])
def test_what_is_compiled_in_a_compacted_block_runs_compiled(path, how):
    model, calls = small_vit(), []

    def backend(graph, _):
        calls.append(path)
        return graph.forward

    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]))
    block = small.blocks[0]
    if how == "in place":
        block.get_submodule(path).compile(backend=backend)
    else:
        setattr(block, path, torch.compile(block.get_submodule(path), backend=backend))
    small(torch.randn(X))
    assert calls == [path]


def test_a_norm_in_half_precision_computes_as_timm_has_it():
    """timm's fast norm takes the dtype of autocast, torch's own float32."""
    set_fast_norm(True)
    try:
        model = small_vit()
    finally:
        set_fast_norm(False)
    small = uvc.compact(model)
    called = copy.deepcopy(small)
    for block in called.blocks:
        block.norm1.register_forward_hook(lambda *_: None)
        block.norm2.register_forward_hook(lambda *_: None)
    x = torch.randn(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small(x), called(x))


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn", "blocks.1.mlp"])
@pytest.mark.parametrize("how", ["replaced", "compiled"])
def test_converting_a_layer_whose_forward_was_replaced_is_refused_by_name(path, how):
    model = small_vit()
    module = model.get_submodule(path)
    if how == "replaced":
        module.forward = lambda x, of=module.forward, **arguments: of(x, **arguments)
    else:
        module.compile()
    with pytest.raises(ValueError, match=rf"{path} has a forward of its own".replace(".", r"\.")):
        uvc.convert(model)


def test_only_a_plain_linear_is_plain():
    assert is_plain(nn.Linear(2, 2))
    parametrized = nn.Linear(2, 2)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert not is_plain(parametrized)

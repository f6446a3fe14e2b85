"""A pruned layer whose children were changed: they are called, and right; what reads weights refuses them."""

import copy
import inspect
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import uvc_kernels
from oracle import MODELS, error, gradient_error, gradients, small_vit, structures
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import uvc
from uvc.layers.children import is_plain
from uvc.structure import Structure

pytestmark = pytest.mark.filterwarnings("ignore:UVC:UserWarning", "ignore::FutureWarning")
X = (2, 3, 16, 16)


class LoRA(nn.Module):
    """As adapters are made: the base's sizes, weight and bias, and a forward pass that adds to it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.a = nn.Parameter(torch.randn(3, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 3, dtype=base.weight.dtype))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Doubled(torch.Tensor):
    """A weight with a product of its own, as quantised and distributed tensors have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * found.as_subclass(torch.Tensor) if func is F.linear else found


class PerToken(nn.Module):
    """An activation with a weight for every neuron."""

    def __init__(self, width: int):
        super().__init__()
        self.slope = nn.Parameter(torch.rand(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


def linears(block: nn.Module) -> list[tuple[nn.Module, str]]:
    halves = (block.attn, block.mlp)
    return [(half, n) for half in halves for n, m in half.named_children() if isinstance(m, nn.Linear)]


def wrap(make):
    def change(block):
        for half, name in linears(block):
            setattr(half, name, make(getattr(half, name)))

    return change


def scaled(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Scaled
    return linear


def own_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x, of=linear: F.linear(x, of.weight, of.bias).tanh()
    return linear


def doubled(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Doubled))
    return linear


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, inputs, out: out.sin())
    return linear


def pre_hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.7,))
    return linear


def back_hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    return linear


def inner_norms(block: nn.Module) -> None:
    block.attn.q_norm, block.attn.k_norm, block.attn.norm = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(24)
    block.mlp.norm = nn.LayerNorm(block.mlp.fc2.in_features)
    block.double()


def gate(block: nn.Module) -> None:
    block.attn.gate = nn.Linear(24, 24).double()


def act(block: nn.Module) -> None:
    block.mlp.act = PerToken(block.mlp.fc2.in_features)


def hooked_act(block: nn.Module) -> None:
    block.mlp.act.register_forward_hook(lambda module, inputs, out: out + 1)
    block.attn.q_norm.register_forward_hook(lambda module, inputs, out: out * 2)


def probabilities(block: nn.Module) -> None:
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: out * out)


CHANGES = {
    "adapters": wrap(LoRA),
    "subclasses": wrap(scaled),
    "forward functions of their own": wrap(own_forward),
    "weights of another tensor class": wrap(doubled),
    "forward hooks": wrap(hooked),
    "forward pre-hooks": wrap(pre_hooked),
    "backward hooks": wrap(back_hooked),
    "prune": wrap(lambda m: prune.l1_unstructured(m, "weight", 0.4)),
    "weight_norm by hook": wrap(lambda m: nn.utils.weight_norm(m)),
    "weight_norm as parametrization": wrap(lambda m: parametrizations.weight_norm(m)),
    "spectral_norm": wrap(lambda m: nn.utils.spectral_norm(m).eval()),
    "inner norms": inner_norms,
    "a gate": gate,
    "an activation with weights": act,
    "hooks on what has no weights": hooked_act,
    "a hook on the attention map": probabilities,
}
SAME_OUTPUT = ("backward hooks", "weight_norm by hook", "weight_norm as parametrization")


def removed_by_hooks(model: nn.Module, structure: Structure) -> nn.Module:
    """A timm model in which hooks zero what `structure` removes, before the children that would read it."""
    for block, kept in zip(model.blocks, structure.blocks, strict=True):
        H, K = block.attn.num_heads, block.attn.head_dim
        qk, v, neurons = torch.zeros(H, 1, K), torch.zeros(H, K), torch.zeros(block.mlp.fc2.in_features)
        for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
            qk[head, 0, list(qk_dims)] = 1
            v[head, list(v_dims)] = 1
        neurons[list(kept.neurons)] = 1
        block.attn.q_norm.register_forward_hook(lambda m, i, out, mask=qk: out * mask)
        # First of all pre-hooks, as others change what the child reads, not what it is given.
        for child, mask in ((block.attn.proj, v.flatten()), (block.mlp.fc2, neurons)):
            child.register_forward_pre_hook(lambda m, i, mask=mask: (i[0] * mask,), prepend=True)
    return model


def changed(change, name: str = "vit") -> nn.Module:
    torch.manual_seed(2)
    model = MODELS[name]().double().eval()
    for block in model.blocks:
        change(block)
    return model.requires_grad_()


def pruned_then_changed(change, name: str = "vit") -> nn.Module:
    torch.manual_seed(2)
    model = MODELS[name]().double().eval()
    uvc.apply_structure(model, structures(model)["random at keep 0.5"])
    for block in model.blocks:
        change(block)
    return model.requires_grad_()


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

"""UVCAttention, UVCMlp and UVCBlock in place of timm's: same arguments, keys, and outputs while dense."""

import copy
import inspect
import warnings

import pytest
import timm
import torch
import uvc_kernels
from oracle import MODELS, TOLERANCE, absent, error, gradients, small_vit, structures
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock

import uvc
from uvc.layers import UVCBlock, UVCGluMlp, UVCSwiGLU
from uvc.structure import Structure

X = (2, 3, 16, 16)


def ragged(model: torch.nn.Module) -> Structure:
    return structures(model)["random at keep 0.5"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(uvc.UVCAttention, Attention), (uvc.UVCMlp, Mlp), (UVCGluMlp, GluMlp), (UVCSwiGLU, SwiGLU)],
)
def test_constructor_and_forward_take_timms_arguments(ours, theirs):
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert list(inspect.signature(ours.forward).parameters) == list(
        inspect.signature(theirs.forward).parameters
    )


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_timm_checkpoint_loads_strictly_into_a_drop_in_model(name):
    plain = timm.create_model(name, depth=2).eval()
    drop_in = timm.create_model(name, depth=2, attn_layer=uvc.UVCAttention, mlp_layer=uvc.UVCMlp).eval()
    drop_in.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(drop_in(x), plain(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: small_vit(init_values=0.1, drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2),
        lambda: small_vit(block_fn=ResPostBlock, init_values=0.1, drop_path_rate=0.3),
        lambda: small_vit(VisionTransformerDistilled),
        lambda: small_vit(attn_layer=uvc.UVCAttention, mlp_layer=uvc.UVCMlp),
        MODELS["swiglu"],
        MODELS["packed swiglu"],
        MODELS["glu, gate last"],
    ],
    ids=["pre-norm", "post-norm", "distilled", "created as drop-in", "swiglu", "packed", "gate last"],
)
def test_converting_changes_no_key_no_parameter_and_no_bit_of_the_output(make, mode):
    model = getattr(make(), mode)()
    x = torch.randn(X)
    torch.manual_seed(1)
    before, keys, parameters = model(x), list(model.state_dict()), list(model.parameters())
    assert uvc.convert(model) is model
    assert uvc.convert(model) is model
    torch.manual_seed(1)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(type(block) is UVCBlock for block in model.blocks)
    assert all(module.training == (mode == "train") for module in model.modules())


def test_hooks_survive_conversion():
    model, seen = small_vit(), []
    for module in (model.blocks[0], model.blocks[0].attn, model.blocks[0].mlp):
        module.register_forward_hook(lambda module, inputs, out: seen.append(type(module).__name__))
    uvc.convert(model)(torch.randn(X))
    assert seen == ["UVCAttention", "UVCMlp", "UVCBlock"]


def test_masks_are_no_state_and_weights_stay():
    model = uvc.convert(small_vit())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    uvc.apply_structure(model, ragged(model))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(before, strict=True)
    assert uvc.structure_of(model) == ragged(model)


def test_kept_masks_come_back_as_they_were_set():
    attn, mlp = uvc.UVCAttention(24, num_heads=4), uvc.UVCMlp(24, 40)
    assert (
        attn.kept_qk.all() and attn.kept_v.all() and mlp.kept_neurons.all() and attn.is_dense and mlp.is_dense
    )
    qk, v, neurons = torch.rand(4, 6) > 0.5, torch.rand(4, 6) > 0.5, torch.rand(40) > 0.5
    v[1] = False
    attn.set_kept(qk, v)
    mlp.set_kept(neurons)
    assert torch.equal(attn.kept_v, v) and torch.equal(mlp.kept_neurons, neurons)
    assert torch.equal(attn.kept_qk, qk & v.any(1, keepdim=True))
    attn.set_kept(None, torch.ones(4, 6, dtype=torch.bool))
    mlp.set_kept(None)
    assert attn.is_dense and mlp.is_dense


@pytest.mark.parametrize(
    ("set_kept", "says"),
    [
        (
            lambda m: m.attn.set_kept(torch.ones(4, 5, dtype=torch.bool), None),
            r"qk must be a bool mask of shape \[4, 6\]",
        ),
        (
            lambda m: m.attn.set_kept(None, torch.ones(4, 6)),
            r"v must be a bool mask of shape \[4, 6\], got torch.float32",
        ),
        (
            lambda m: m.mlp.set_kept(torch.ones(39, dtype=torch.bool)),
            r"neurons must be a bool mask of shape \[40\]",
        ),
    ],
    ids=["wrong shape", "not bool", "wrong length"],
)
def test_a_mask_that_does_not_fit_is_refused(set_kept, says):
    with pytest.raises(ValueError, match=says):
        set_kept(uvc.convert(small_vit()).blocks[0])


def test_setting_a_mask_takes_a_copy():
    attn, v = uvc.UVCAttention(24, num_heads=4), torch.ones(4, 6, dtype=torch.bool)
    v[0] = False
    attn.set_kept(None, v)
    v[1] = False
    attn.kept_v[2] = False
    assert attn.kept_v.sum() == 18


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_copies_and_dtype_moves_keep_the_structure(dtype):
    model = uvc.apply_structure(small_vit(), ragged(small_vit())).eval()
    moved = copy.deepcopy(model).to(dtype)
    assert uvc.structure_of(moved) == uvc.structure_of(model)
    out = moved(torch.randn(X).to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    uvc.apply_structure(moved, Structure.dense(moved))
    assert uvc.structure_of(model) == ragged(model)


def test_a_default_device_elsewhere_does_not_matter():
    model, x = small_vit(), torch.randn(X)
    expected = uvc.apply_structure(copy.deepcopy(model), ragged(model))(x)
    with torch.device("meta"):
        uvc.apply_structure(model, Structure.random(model, 0.5, seed=3))
        small = uvc.compact(model)
        assert uvc.cost(model) == uvc.cost(small)
    assert torch.equal(model(x), expected)
    assert error(small(x), expected) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"])
def test_every_fast_activation_equals_dense_with_contributions_absent(activation, dtype):
    model = small_vit(depth=1, act_layer=activation).to(dtype)
    x = torch.randn(X, dtype=dtype)
    truth = absent(model, ragged(model))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        found = uvc.apply_structure(copy.deepcopy(model), ragged(model))(x)
    assert error(found, truth) < TOLERANCE[dtype]


GATED = ["swiglu", "packed swiglu", "glu, gate last"]


@pytest.mark.parametrize("name", GATED)
def test_a_gated_mlp_takes_the_fast_op(name):
    model = MODELS[name]().double()
    x = torch.randn(X, dtype=torch.float64)
    truth = absent(model, ragged(model))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = uvc.apply_structure(model, ragged(model))(x)
    assert error(found, truth) < 1e-10


@pytest.mark.parametrize("name", GATED)
@pytest.mark.filterwarnings("ignore:UVC")
def test_a_gated_mlp_with_another_activation_runs_in_plain_torch(name):
    model = MODELS[name]().double()
    for block in model.blocks:
        block.mlp.act = torch.nn.Sigmoid()
    x = torch.randn(X, dtype=torch.float64)
    truth = absent(model, ragged(model))(x)
    assert error(uvc.apply_structure(model, ragged(model))(x), truth) < 1e-10


@pytest.mark.parametrize("name", ["vit", *GATED])
def test_a_neuron_at_zero_in_all_its_rows_and_its_column_is_dead_and_skipped_without_loss(name):
    model = uvc.convert(MODELS[name]()).double()
    dead = torch.arange(model.blocks[0].mlp.fc2.in_features) % 3 == 0
    x = torch.randn(X, dtype=torch.float64)
    for block in model.blocks:
        with torch.no_grad():
            block.mlp.fc2.weight[:, dead] = 0
            for part in block.mlp.parts():
                part.parameter.narrow(part.dim, part.start, part.size).movedim(part.dim, 0)[dead] = 0
    full = model(x)
    dense = gradients(model, full)
    for i, block in enumerate(model.blocks):
        assert not dense[f"blocks.{i}.mlp.fc2.weight"][:, dead].any()
        names = {id(p): name for name, p in block.mlp.named_parameters()}
        parts = [part for part in block.mlp.parts() if part.dim == 0]
        rows = [(names[id(part.parameter)], part.start) for part in parts]
        assert not any(dense[f"blocks.{i}.mlp.{n}"][s : s + len(dead)][dead].any() for n, s in rows)
        # Every parameter of the first layers is covered, and nothing twice.
        first = sum(p.numel() for n, p in block.mlp.named_parameters() if n.startswith("fc1"))
        assert first == sum(part.parameter[part.start :][: part.size].numel() for part in parts)
        assert len(set(rows)) == len(rows)
        block.mlp.set_kept(~dead)
    assert error(model(x), full) < 1e-12


def test_another_activation_runs_in_plain_torch_and_says_so_once(monkeypatch):
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    model = small_vit(act_layer="mish").double()
    x = torch.randn(X, dtype=torch.float64)
    truth = absent(model, ragged(model))(x)
    converted = uvc.apply_structure(copy.deepcopy(model), ragged(model))
    with pytest.warns(UserWarning, match="the activation Mish is outside the fast op") as caught:
        out = converted(x)
    assert len([w for w in caught if "Mish" in str(w.message)]) == 1
    assert error(out, truth) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        converted(x)


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
@pytest.mark.filterwarnings("ignore:UVC")
def test_dropout_is_honoured_in_training_and_gone_in_eval(rate):
    model = small_vit(**{rate: 0.5}).double()
    converted = uvc.apply_structure(copy.deepcopy(model), ragged(model))
    x = torch.randn(64, 3, 16, 16, dtype=torch.float64)
    truth = absent(model.eval(), ragged(model))(x)
    assert error(converted.eval()(x), truth) < 1e-10
    assert error(converted.train()(x), truth) > 0.1


@pytest.mark.filterwarnings("ignore:UVC")
def test_attention_dropout_of_kept_heads_is_right_on_average():
    attn = uvc.UVCAttention(24, num_heads=4, attn_drop=0.3, qkv_bias=True).double()
    qk, v = torch.rand(2, 4, 6) > 0.4
    attn.set_kept(qk, v)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        mean = attn.train()(x.expand(20000, -1, -1)).mean(0, keepdim=True)
        assert error(mean, attn.eval()(x)) < 0.02


def test_a_skipped_half_does_not_run():
    model = uvc.convert(small_vit())
    model.blocks[1].set_skip(True, False)
    model.blocks[2].set_skip(False, True)
    assert [(b.skip_attn, b.skip_mlp) for b in model.blocks] == [(False, False), (True, False), (False, True)]
    ran = []
    for i, block in enumerate(model.blocks):
        for half in ("attn", "mlp"):
            getattr(block, half).register_forward_hook(lambda m, inputs, out, key=(i, half): ran.append(key))
    model(torch.randn(X))
    assert ran == [(0, "attn"), (0, "mlp"), (1, "mlp"), (2, "attn")]


@pytest.mark.parametrize("block_fn", [None, ResPostBlock], ids=["pre-norm", "post-norm"])
def test_gates_scale_the_branches_and_get_their_gradient(block_fn):
    model = small_vit(depth=1, **({"block_fn": block_fn} if block_fn else {})).double()
    block, x = uvc.convert(model).blocks[0], torch.randn(2, 5, 24, dtype=torch.float64)
    gates = [torch.tensor(g, dtype=torch.float64, requires_grad=True) for g in (0.7, 0.2)]
    parameters = len(list(block.parameters()))
    block.set_gates(*gates)
    assert len(list(block.parameters())) == parameters
    assert torch.autograd.gradcheck(lambda a, m: (block.set_gates(a, m), block(x))[1], gates)
    block.set_gates(torch.ones(()), None)
    open_, _ = block(x), block.set_gates(None, None)
    assert torch.equal(open_, block(x))
    block.set_gates(torch.zeros(()), torch.zeros(()))
    assert torch.equal(block(x), x)


def test_a_parameter_as_gate_is_not_taken_as_weight():
    model = uvc.convert(small_vit())
    keys = list(model.state_dict())
    model.blocks[0].set_gates(torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(())))
    assert list(model.state_dict()) == keys


def test_gradient_checkpointing_gives_the_same_gradients():
    model = uvc.apply_structure(small_vit(), ragged(small_vit()))
    x = torch.randn(X)
    expected = gradients(model, model(x))
    model.set_grad_checkpointing()
    found = gradients(model, model(x))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("compacted", [False, True], ids=["on the fly", "compacted"])
def test_autocast_computes_in_bfloat16(compacted):
    model = uvc.apply_structure(small_vit(), ragged(small_vit())).eval()
    x = torch.randn(X)
    exact = model(x)
    model = uvc.compact(model) if compacted else model
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        branch = model.blocks[0].mlp(torch.randn(1, 5, 24))
    assert branch.dtype == torch.bfloat16
    assert 1e-6 < error(out.float(), exact) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "ragged", "compacted"])
def test_torch_compile_gives_the_same_outputs_and_gradients(kind):
    model = uvc.convert(small_vit(depth=1))
    if kind != "dense":
        uvc.apply_structure(model, ragged(model))
    if kind == "compacted":
        model = uvc.compact(model)
    x = torch.randn(X)
    expected, out = model(x), torch.compile(model, backend="aot_eager")(x)
    assert error(out, expected) < 1e-5
    truth, found = gradients(model, expected), gradients(model, torch.compile(model, backend="aot_eager")(x))
    assert all(error(found[name], truth[name], 1e-3) < 1e-4 for name in truth)


@pytest.mark.parametrize("backend", ["cpu", "cuda-host"])
def test_recomputing_the_first_products_saves_less_and_changes_nothing(backend):
    model, x = small_vit(), torch.randn(X)
    uvc.apply_structure(model, Structure.random(model, 0.7, seed=3))
    results, saved = [], []
    for on in (False, True):
        uvc.layers.set_recompute(model, on)
        model.zero_grad()
        sizes = {}

        def note(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with uvc_kernels.backend(backend), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        saved.append(sum(sizes.values()))
    assert saved[1] < 0.9 * saved[0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""The variants that benchmarks compare do the same job, and what cannot be compared is named."""

import copy
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import uvc
from uvc.bench import layer_variants, op_variants, steps, variants
from uvc.bench.layer_variants import LayerShape
from uvc.bench.models import BESIDE, models
from uvc.bench.roofline import kept_of
from uvc.bench.variants import PRUNED, build, gate
from uvc.solver import Search

CPU = torch.device("cpu")
EAGER = [variant for variant in variants.VARIANTS if variant not in ("compiled", "torch_pruning")]


@pytest.fixture
def small():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5
    ).double()


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.02])
def test_pruned_ways_agree_in_outputs_and_gradients(small, keep):
    built, left = build("", keep, 2, CPU, EAGER, dense=small)
    assert list(built) == EAGER and not left
    x, found = torch.randn(2, 3, 16, 16, dtype=torch.float64), {}
    for variant in PRUNED:
        model = built[variant].model.eval()
        out = model(x)
        (grad,) = torch.autograd.grad(out.square().sum(), [model.blocks[0].norm1.weight])
        found[variant] = torch.cat([out.flatten(), grad.flatten()]).detach()
    assert gate(found, torch.float64, "test") < 1e-9
    assert not torch.allclose(found["masked"][:10], built["dense"].model(x).flatten())


def test_building_leaves_the_dense_model_dense(small):
    before = copy.deepcopy(small.state_dict())
    build("", 0.5, 2, CPU, EAGER, dense=small)
    assert not any(type(module).__module__.startswith("uvc") for module in small.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), small.state_dict().values(), strict=True))


def test_the_gate_refuses_ways_that_disagree():
    a = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"logits: b and a disagree by 1\.0e-03"):
        gate({"a": a, "b": a * 1.001}, torch.float32, "logits")
    with pytest.raises(RuntimeError, match="disagree by nan"):
        gate({"a": a, "b": a * float("nan")}, torch.float32, "logits")


def test_a_package_that_is_not_installed_is_left_out_by_name(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    built, left = build("", 0.5, 2, CPU, ["dense", "torch_pruning"], dense=small)
    assert list(built) == ["dense"]
    assert left == [("torch_pruning", "the package torch-pruning is not installed")]


def test_compilation_without_a_compiler_is_left_out_by_name(small, monkeypatch):
    from torch._inductor import cpp_builder

    def none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    built, left = build("", 0.5, 2, CPU, ["dense", "compiled"], dense=small)
    assert list(built) == ["dense"] and left == [("compiled", "No working C++ compiler found")]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("op", ["attention", "mlp"])
def test_a_layer_has_every_way_and_backend(op, backward):
    eager = [variant for variant in layer_variants.VARIANTS if variant != "compiled"]
    shape = LayerShape(dim=128, heads=2, hidden=96, tokens=17)
    made = layer_variants.layer(op, shape, 0.5, 2, CPU, torch.float32, backward, inputs=3, variants=eager)
    providers = [name for name in ("cpu", "reference") if f"on_the_fly/{name}" in made.calls]
    assert set(made.calls) == {*eager, *(f"on_the_fly/{name}" for name in providers)}
    assert {"triton", "cuda-host"} <= {variant for variant, _ in made.left}
    assert made.error < 1e-4
    for variant, call in made.calls.items():
        for i in range(4):
            assert call(i) is not None
        assert made.works[variant].flops > 0
    assert made.works["dense"].flops > 1.9 * made.works["on_the_fly/reference"].flops


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    import uvc_kernels

    right = uvc_kernels.mlp
    monkeypatch.setattr(
        uvc_kernels, "mlp", lambda x, *rest: right(x, *rest) * (1.01 if x.dtype == torch.float32 else 1)
    )
    with pytest.raises(RuntimeError, match=r"mlp, keep 0\.5: the output of on_the_fly/.* is off by 1\.0e-02"):
        layer_variants.layer(
            "mlp", LayerShape(128, 2, 96, 17), 0.5, 2, CPU, torch.float32, False, variants=["dense"]
        )


def test_the_solver_works_beside_a_step_and_keeps_the_structure(small):
    model = uvc.apply_structure(small.float(), uvc.Structure.random(small, 0.5))
    structure, weight = uvc.structure_of(model), model.blocks[0].mlp.fc1.weight.detach().clone()
    x, y = steps.images_and_labels(model, 4, CPU)
    step = steps.searching(model, x, y, torch.float32)
    for i in range(4):
        step(i)
    assert uvc.structure_of(model) == structure
    removed = ~model.blocks[0].mlp.kept_neurons
    assert not model.blocks[0].mlp.fc1.weight[removed].any(), "what is removed is at zero in a search"
    assert not torch.equal(model.blocks[0].mlp.fc1.weight[~removed], weight[~removed])


@pytest.mark.parametrize(("variant", "parts"), [("solver", 2), ("solver_removing", 3)])
def test_the_solver_alone_does_its_whole_step_and_keeps_the_structure(small, monkeypatch, variant, parts):
    model = uvc.apply_structure(small.float(), uvc.Structure.random(small, 0.5))
    structure, done = uvc.structure_of(model), []
    for name in ("observe", "step", "remove_dead"):
        run = getattr(Search, name)
        monkeypatch.setattr(Search, name, lambda *args, run=run, name=name: (done.append(name), run(*args)))
    step = BESIDE[variant](model, *steps.images_and_labels(model, 4, CPU), torch.float32)
    done.clear()
    for i in range(20):
        step(i)
    assert done == ["observe", "step", "remove_dead"][:parts] * 20 and uvc.structure_of(model) == structure


@pytest.mark.parametrize(
    ("op", "backward"), [("group_scores", False), ("prox_shrink", False), ("gather", False), ("gather", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_op_over_all_layers_stands_beside_plain_torch(op, backward, dtype):
    shape = LayerShape(dim=24, heads=2, hidden=20, head_dim=16, depth=3)
    made = op_variants.op(op, shape, 0.5, CPU, dtype, backward, inputs=2)
    kernel = next(variant for variant in made.calls if variant != "plain_torch")
    assert set(made.calls) == {"plain_torch", kernel} and made.backends == {kernel: kernel.partition("/")[2]}
    assert made.error < 1e-6
    for call in made.calls.values():
        for i in range(3):
            call(i)
    # 3 layers of (4 x 32 + 2 x 20) x 24 weights with 3 x 32 + 20 biases, in as many groups and twice that.
    weights, groups = 3 * ((4 * 32 + 2 * 20) * 24 + 3 * 32 + 20), 3 * (6 * 32 + 32 + 3 * 20)
    size, kept = dtype.itemsize, weights // 2
    moved = {
        "group_scores": 8 * weights + 4 * groups,
        "prox_shrink": 4 * (kept + weights + groups),
        "gather": size * kept + 4 * (weights if backward else kept),
    }
    assert made.works[kernel].bytes == moved[op]
    assert made.works["plain_torch"].bytes - made.works[kernel].bytes == 4 * kept * (op == "prox_shrink")


@pytest.mark.parametrize("op", op_variants.OPS)
def test_an_op_that_is_wrong_is_not_timed(op, monkeypatch):
    import uvc_kernels

    right = getattr(uvc_kernels, op)

    def wrong(*args):
        out = right(*args)
        with torch.no_grad():
            (args[0][-1] if op == "prox_shrink" else out[-1]).mul_(1.01)
        return out

    monkeypatch.setattr(uvc_kernels, op, wrong)
    with pytest.raises(RuntimeError, match=rf"{op}.*disagree by"):
        op_variants.op(op, LayerShape(24, 2, 20, head_dim=16, depth=2), 0.5, CPU, torch.float32)


def test_a_group_of_models_steps_in_every_way():
    made = models(
        "uvc_vit_digits",
        "training",
        0.5,
        4,
        CPU,
        torch.float32,
        ["dense", "on_the_fly", "compacted"],
        beside=BESIDE,
    )
    assert set(made.steps) == {"dense", "compacted", "on_the_fly/auto", *(f"{name}/auto" for name in BESIDE)}
    assert made.standing["on_the_fly/auto"] == made.standing["dense"] > made.standing["compacted"]
    for variant, step in made.steps.items():
        step(0)
        assert made.works[variant].flops > 0
    assert made.error < 1e-4


def test_peak_memory_counts_what_a_step_allocates():
    kept = []

    def step(_):
        kept.clear()
        x = torch.empty(1 << 20)  # 4 MiB
        kept.append(torch.empty(1 << 19))  # 2 MiB that stay until the next step
        del x

    assert steps.peak_mib(step, CPU) == pytest.approx(6, abs=0.1)


def test_kept_counts_of_a_skipped_half_are_none():
    block = uvc.structure.BlockStructure(True, False, (0,), ((0, 1),), ((0,),), (0, 1, 2))
    assert kept_of(block) == (2, 1, None)

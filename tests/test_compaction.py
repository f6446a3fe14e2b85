"""One sentence, three computations: dense without what is removed = skipped on the fly = compacted."""

import copy
import dataclasses
import itertools

import pytest
import timm
import torch
from oracle import (
    MODELS,
    TOLERANCE,
    absent,
    distilled_198,
    error,
    gradient_error,
    gradients,
    images,
    positions,
    small_vit,
    stored,
    structures,
)
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import uvc
from uvc.compaction import equivalent, forms_of, in_form, quick_forms
from uvc.layers import FORMS
from uvc.layers.compact_attention import in_whole_vectors

CASES = list(structures(small_vit()))


def agree(model: nn.Module, structure: uvc.Structure, x: torch.Tensor) -> None:
    """Hold the converted and the compacted model to the dense one without the removed contributions."""
    tolerance = TOLERANCE[x.dtype]
    truth = absent(model, structure)(x)
    truth_gradients = gradients(model, truth)
    converted = uvc.apply_structure(copy.deepcopy(model), structure)
    small = uvc.compact(converted)

    out = converted(x)
    found = gradients(converted, out)
    assert error(out, truth) < tolerance
    assert gradient_error(found, truth_gradients) < tolerance
    where = positions(converted)
    for name, gradient in found.items():
        removed = torch.ones(gradient.numel(), dtype=torch.bool)
        removed[where.get(name, torch.empty(0, dtype=torch.int64)).flatten()] = False
        assert (gradient.flatten()[removed] == 0).all(), f"{name} has gradients in removed groups"

    out = small(x)
    found = gradients(small, out)
    kept_gradients = {name: truth_gradients[name].flatten()[index] for name, index in where.items()}
    assert error(out, truth) < tolerance
    assert gradient_error(found, kept_gradients) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_the_fly_and_compacted_equal_dense_with_contributions_absent(case, dtype):
    model = small_vit().to(dtype)
    agree(model, structures(model)[case], torch.randn(3, 3, 16, 16, dtype=dtype))


@pytest.mark.parametrize("name", list(MODELS)[1:])
@pytest.mark.parametrize("case", ["random at keep 0.5", "halves skipped in turn", "no heads", "no neurons"])
def test_every_kind_of_model_equals_dense_with_contributions_absent(name, case):
    model = MODELS[name]().double().eval()  # a T2T stem drops in training whatever is asked
    agree(model, structures(model)[case], images(model, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_198_tokens_at_batch_1_equal_dense_with_contributions_absent(dtype):
    model = distilled_198().to(dtype)
    agree(model, uvc.Structure.random(model, 0.5, seed=1), torch.randn(1, 3, 224, 224, dtype=dtype))


def test_deit_tiny_equals_dense_with_contributions_absent():
    model = timm.create_model("deit_tiny_patch16_224")
    agree(model, uvc.Structure.random(model, 0.5, seed=0), torch.randn(1, 3, 224, 224))


def test_the_model_itself_stays_as_it_was():
    model = uvc.apply_structure(small_vit(), uvc.Structure.random(small_vit(), 0.5))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = uvc.compact(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_skipped_half_leaves_no_parameters_behind():
    model = small_vit(init_values=0.1)
    small = uvc.compact(uvc.apply_structure(model, structures(model)["every block skipped"]))
    assert not list(small.blocks.parameters())
    assert uvc.cost(small).blocks == ((0, 0),) * 3


def test_a_compacted_model_holds_no_uvc_layer_and_calls_no_kernel(monkeypatch):
    model = small_vit()
    small = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5)))
    assert not any(isinstance(m, uvc.UVCAttention | uvc.UVCMlp) for m in small.modules())
    for op in ("attention", "mlp"):
        monkeypatch.setattr(f"uvc_kernels.{op}", None)
    assert small(torch.randn(1, 3, 16, 16)).isfinite().all()
    with pytest.raises(TypeError):
        model(torch.randn(1, 3, 16, 16))


def test_a_compacted_model_is_timm_style():
    model = small_vit()
    small = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5))).eval()
    x = torch.randn(2, 3, 16, 16)
    assert type(small) is VisionTransformer
    assert torch.equal(small.forward_head(small.forward_features(x)), small(x))
    small.set_grad_checkpointing()
    assert torch.equal(small.train()(x), small.eval()(x))


@pytest.mark.filterwarnings("ignore:UVCAttention")
@pytest.mark.parametrize("mask", ["boolean mask", "additive mask per head", "causal"])
def test_attention_masks_reach_the_kept_heads(mask):
    model = small_vit().double()
    structure = structures(model)["a head without q/k dims"]
    converted = uvc.apply_structure(copy.deepcopy(model), structure)
    arguments = {
        "boolean mask": dict(attn_mask=torch.eye(17, dtype=torch.bool) | (torch.rand(17, 17) > 0.4)),
        "additive mask per head": dict(attn_mask=torch.randn(2, 4, 17, 17, dtype=torch.float64)),
        "causal": dict(is_causal=True),
    }[mask]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    truth = absent(model, structure)(x, **arguments)
    expected = gradients(model, truth)
    out = converted(x, **arguments)
    assert error(out, truth) < 1e-10
    assert gradient_error(gradients(converted, out), expected) < 1e-10
    assert error(uvc.compact(converted)(x, **arguments), truth) < 1e-10


def test_dropout_runs_in_training_only():
    model = small_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    small = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5)))
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(small.train()(x), small(x))
    assert torch.equal(small.eval()(x), small(x))


def test_a_frozen_parameter_stays_frozen():
    model = small_vit()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    small = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5)))
    assert not small.blocks[0].attn.qkv.weight.requires_grad
    assert small.blocks[1].attn.qkv.weight.requires_grad


def test_equivalent_measures_the_difference_of_two_models():
    model = uvc.apply_structure(small_vit(), uvc.Structure.random(small_vit(), 0.5))
    small, x = uvc.compact(model), torch.randn(2, 3, 16, 16)
    assert equivalent(model, small, x) < 1e-5
    with torch.no_grad():
        small.head.bias += 1
    assert equivalent(model, small, x) > 0.01
    assert model.training and small.training


def test_torch_export_gives_the_same_outputs():
    model = small_vit()
    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"])).eval()
    x = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(small, (x,)).module()
    assert error(exported(x), small(x)) < 1e-6


def products(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The products of matrices in a compiled program, in their order."""
    names = []

    def backend(graph, inputs):
        names.extend(n.target.__name__ for n in graph.graph.nodes if callable(n.target))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        assert error(torch.compile(model, backend=backend, fullgraph=True)(x), model(x)) < 1e-5
    return [name for name in names if name in ("linear", "addmm")]


@pytest.mark.parametrize("form", FORMS)
def test_compiled_the_last_product_of_a_half_begins_with_the_residual(form):
    structure = uvc.Structure.random(small_vit(), 0.5, seed=3)
    model = uvc.compact(uvc.apply_structure(small_vit(), structure), form).eval()
    alone, x = copy.deepcopy(model), images(model, 2)
    for block in alone.blocks:
        block.attn.register_forward_hook(lambda *_: None)
    found, hooked = products(model, x), products(alone, x)
    last = ["linear", "addmm"]
    assert found == [*last * 2 * len(model.blocks), "linear"]
    assert set(hooked) == {"linear"}  # a block with a hook in it calls its halves


def test_compiled_a_layer_scale_lies_between_a_half_and_the_residual():
    model = small_vit(init_values=0.5)
    model = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=3))).eval()
    assert set(products(model, images(model, 2))) == {"linear"}


def test_compiled_a_drop_path_that_is_set_later_is_not_passed_over():
    model = small_vit()
    model = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=3))).eval()
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = nn.Identity()
    assert set(products(model, images(model, 2))) == {"linear"}


@pytest.mark.parametrize("name", MODELS)
def test_padded_heads_equal_grouped_ones(name):
    model = MODELS[name]().double().eval()
    x = images(model, dtype=torch.float64)
    for case, structure in structures(model).items():
        converted = uvc.apply_structure(copy.deepcopy(model), structure)
        grouped, padded = uvc.compact(converted), uvc.compact(converted, "padded")
        assert error(padded(x), grouped(x)) < 1e-12, case
        assert uvc.cost(padded) == uvc.cost(grouped) and uvc.structure_of(padded) == structure
        for block in padded.blocks:
            assert not block.record.attn or len(block.attn.groups) == min(len(block.record.heads), 1)


def calls(model: torch.nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """How many modules and how many ops run."""

    class Ops(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.count += 1
            return op(*args, **(kwargs or {}))

    modules = []
    handles = [m.register_forward_pre_hook(lambda m, args: modules.append(m)) for m in model.modules()]
    with torch.inference_mode(), Ops() as ops:
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return len(modules), ops.count


@pytest.mark.parametrize("case", ["random at keep 0.5", "a head without q/k dims"])
def test_padded_a_block_makes_fewer_calls_than_a_dense_one(case):
    model, x = small_vit(init_values=0.1), torch.randn(1, 17, 24)
    structure = structures(model)[case]
    small = uvc.compact(uvc.apply_structure(copy.deepcopy(model), structure), "padded")
    for dense, block in zip(model.blocks, small.blocks, strict=True):
        assert all(a < b for a, b in zip(calls(block, x), calls(dense, x), strict=True))


def test_a_head_of_its_own_size_takes_four_calls():
    model, x = small_vit(), torch.randn(1, 17, 24)
    found = []
    for heads in (2, 3):
        structure = uvc.Structure.dense(model)
        kept = [tuple(range(n)) for n in (1, 3, 2)[:heads]]
        one = dataclasses.replace(
            structure.blocks[0],
            heads=tuple(range(heads)),
            qk_dims=tuple(kept),
            v_dims=tuple([(0, 2, 4, 5)] * heads),
        )
        structure = uvc.Structure((one, *structure.blocks[1:]))
        attn = uvc.compact(uvc.apply_structure(copy.deepcopy(model), structure)).blocks[0].attn
        found.append(calls(attn, x)[1])
    # The transposed keys, both products, softmax.
    assert found[1] - found[0] == 4


@pytest.mark.parametrize("case", ["random at keep 0.5", "a head without q/k dims"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_without_a_mask_is_that_with_a_mask_of_zeros(form, case):
    model = small_vit(attn_drop_rate=0.5, depth=6).double().train()
    small = uvc.compact(uvc.apply_structure(model, structures(model)[case]), form)
    x, mask = torch.randn(3, 17, 24, dtype=torch.float64), torch.zeros(17, 17, dtype=torch.float64)
    for block in small.blocks:
        if block.record.attn:
            found = []
            for arguments in ({}, {"attn_mask": mask}):
                torch.manual_seed(0)  # of dropout
                found.append(block.attn(x, **arguments))
            assert error(*found) < 1e-12


def heads_of(model, *dims):
    """Every block keeps as many q/k dims and v dims of each head as `dims` says."""
    whole, kept = uvc.Structure.dense(model), tuple(tuple(range(n)) for n in dims)
    blocks = (dataclasses.replace(b, qk_dims=kept, v_dims=kept) for b in whole.blocks)
    return uvc.Structure(tuple(blocks))


def test_heads_are_padded_where_that_costs_less_than_the_products_it_saves():
    with torch.device("meta"):
        model, large = small_vit(), timm.create_model("deit_small_patch16_224")
    assert quick_forms(model, heads_of(model, 6, 1, 2, 3)) == ("padded",) * 3
    even, uneven = heads_of(large, 30, 32, 28, 34, 33, 29), heads_of(large, 64, 8, 8, 8, 8, 6)
    assert set(quick_forms(large, even)) == {"padded"} and set(quick_forms(large, uneven)) == {"grouped"}
    small = uvc.compact(uvc.apply_structure(large, uneven), "auto")
    assert set(forms_of(small)) == {"grouped"}


@pytest.mark.parametrize("name", MODELS)
def test_a_compacted_model_goes_from_form_to_form_with_its_weights(name):
    model = MODELS[name]().eval()
    converted = uvc.apply_structure(model, structures(model)["random at keep 0.5"])
    small = {form: uvc.compact(converted, form) for form in FORMS}
    for form, other in itertools.permutations(FORMS):
        assert stored(in_form(small[form], other)) == stored(small[other])
    x = images(model)
    mixed = in_form(small["grouped"], ["padded", *["grouped"] * (len(model.blocks) - 1)])
    assert forms_of(mixed)[:2] == ("padded", "grouped")
    assert error(mixed(x), small["grouped"](x)) < 1e-5


def test_training_leaves_the_padding_zero():
    model = small_vit()
    small = uvc.compact(uvc.apply_structure(model, structures(model)["a head without q/k dims"]), "padded")
    padding = {name: p == 0 for name, p in small.named_parameters() if ".attn." in name or ".mlp." in name}
    for half in (".attn.", ".mlp."):
        assert sum(int(zero.sum()) for name, zero in padding.items() if half in name) > 100
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.01)
    for _ in range(3):
        small(images(model)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in small.named_parameters():
        if name in padding:
            assert (parameter[padding[name]] == 0).all(), name


def test_padded_heads_rank_tokens_as_grouped_ones_do():
    model = small_vit().double()
    for case in ("random at keep 0.5", "a head without q/k dims", "no heads"):
        structure = structures(model)[case].with_tokens(model, 0.5, at=[1])
        converted = uvc.apply_structure(copy.deepcopy(model), structure)
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        assert error(uvc.compact(converted, "padded")(x), uvc.compact(converted)(x)) < 1e-12


@pytest.mark.parametrize("form", ["ragged", ["padded"], 3, ["padded", "padded", "x"]], ids=str)
def test_an_unknown_form_is_refused(form):
    with pytest.raises(ValueError, match="form must be one of grouped, padded, auto, or one for each of 3"):
        uvc.compact(small_vit(), form)


def test_replaced_heads_cannot_take_another_form():
    model = small_vit()
    small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]))
    small.blocks[0].attn.proj = torch.nn.Linear(3, 24)
    with pytest.raises(ValueError, match="the attn is not as it was compacted, so it cannot be padded"):
        in_form(small, "padded")


def test_compacting_twice_is_an_error():
    small = uvc.compact(small_vit())
    with pytest.raises(ValueError, match=r"blocks\.0 is a CompactBlock"):
        uvc.compact(small)


def test_rows_that_a_gpu_reads_in_whole_vectors_begin_at_one():
    parts = torch.randn(2, 5, 13 + 16 + 16, dtype=torch.bfloat16).split([13, 16, 16], -1)
    q = parts[1].view(2, 5, 2, 8).transpose(1, 2)
    found = in_whole_vectors(q)
    assert torch.equal(found, q) and not found.storage_offset() and found.stride() == (80, 40, 8, 1)
    whole = torch.randn(2, 5, 48, dtype=torch.bfloat16)[..., 16:32].view(2, 5, 2, 8).transpose(1, 2)
    assert in_whole_vectors(whole) is whole
    # Dims that are no whole vectors torch itself pads.
    assert in_whole_vectors(parts[0]) is parts[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("form", ["grouped", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_of_many_sizes_run_on_a_gpu_with_gradients(form, dtype):
    model = timm.create_model("deit_small_patch16_224", depth=2).cuda()
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=0))
    small, images = uvc.compact(model, form), torch.randn(8, 3, 224, 224, device="cuda")
    logits = []
    for each in (model, small):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits.append(each(images).float())
        logits[-1].square().mean().backward()
    assert (logits[0] - logits[1]).abs().max() <= 0.05 * logits[0].abs().max()
    grads = [each.patch_embed.proj.weight.grad for each in (model, small)]
    assert (grads[0] - grads[1]).abs().max() <= 0.05 * grads[0].abs().max()

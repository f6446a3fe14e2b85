"""Token slimming: on the fly = compacted = a dense model that drops the tokens itself; limits and cost."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
import uvc_kernels
from oracle import MODELS, TOLERANCE, error, gradient_error, gradients, images, small_vit, stored, structures
from torch import Tensor, nn

import uvc
from uvc.costs import count_macs
from uvc.io.export import export
from uvc.structure import BlockStructure, Structure


def by_hand(model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
    """The plain timm `model` without what `structure` removes; ranks by whole attention maps."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    p = model.num_prefix_tokens
    for block, kept in zip(model.blocks, structure.blocks, strict=True):
        post, attn = not hasattr(block, "ls1"), block.attn
        A, K = attn.attn_dim, attn.head_dim
        scores = torch.zeros(x.shape[:2], dtype=x.dtype)
        if kept.attn:
            y = x if post else block.norm1(x)
            q, k, v = attn.qkv(y).split(A, -1)
            out, mask = x.new_zeros(*x.shape[:2], A), x.new_zeros(A)
            for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
                columns, dims = [head * K + d for d in v_dims], slice(head * K, head * K + K)
                one, other = attn.q_norm(q[..., dims])[..., qk_dims], attn.k_norm(k[..., dims])[..., qk_dims]
                logits = attn.scale * one @ other.transpose(1, 2)
                out = out.index_add(-1, torch.tensor(columns), logits.softmax(-1) @ v[..., columns])
                mask[columns] = 1
                if qk_dims:
                    row = logits[:, 0] if model.global_pool == "token" else logits.mean(1)
                    scores = scores + row.softmax(-1)
            branch = attn.proj(attn.norm(out) * mask)
            x = x + (block.norm1(branch) if post else block.ls1(branch))
        if kept.tokens is not None:
            scores = scores if scores.any() else x.norm(dim=-1)
            rows = []
            for image, score in zip(x, scores.tolist(), strict=True):
                order = sorted(range(p, len(score)), key=lambda i: -score[i])
                rows.append(image[list(range(p)) + sorted(order[: kept.tokens])])
            x = torch.stack(rows)
        if kept.mlp:
            fc2 = torch.zeros_like(block.mlp.fc2.weight)
            fc2[:, list(kept.neurons)] = block.mlp.fc2.weight[:, list(kept.neurons)]
            y = x if post else block.norm2(x)
            branch = torch.func.functional_call(block.mlp, {"fc2.weight": fc2}, (y,))
            x = x + (block.norm2(branch) if post else block.ls2(branch))
    return model.forward_head(model.norm(x))


def agree(model: nn.Module, structure: Structure) -> None:
    x = images(model, batch=3, dtype=torch.float64)
    model = model.double().eval()
    truth = by_hand(model, structure, x)
    expected = gradients(model, truth)
    converted = uvc.apply_structure(copy.deepcopy(model), structure)
    out = converted(x)
    assert out.shape == truth.shape and error(out, truth) < TOLERANCE[torch.float64]
    assert gradient_error(gradients(converted, out), expected) < TOLERANCE[torch.float64]
    assert error(uvc.compact(converted)(x), truth) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", MODELS)
def test_on_the_fly_and_compacted_equal_a_model_that_drops_the_tokens_by_hand(name):
    model = MODELS[name]()
    agree(model, Structure.random(model, 0.5, seed=3).with_tokens(model, 0.6))


@pytest.mark.parametrize("case", structures(small_vit()))
def test_tokens_go_along_with_everything_else_that_goes(case):
    model = small_vit()
    agree(model, structures(model)[case].with_tokens(model, 0.6))


def test_dropping_tokens_changes_the_output_and_keeping_all_does_not():
    model, x = small_vit().eval(), torch.randn(2, 3, 16, 16)
    dense = model(x)
    everything = Structure.dense(model).with_tokens(model, 1.0)
    assert torch.equal(uvc.apply_structure(model, everything)(x), dense)
    uvc.apply_structure(model, Structure.dense(model).with_tokens(model, 0.6))
    assert error(model(x), dense) > 1e-3
    assert model.forward_features(x).shape[1] == 1 + 4  # 16 -> 10 -> 6 -> 4
    assert torch.equal(uvc.apply_structure(model, Structure.dense(model))(x), dense)


def test_json_says_tokens_only_where_some_go_and_gives_them_back():
    dense = Structure.dense(small_vit())
    assert "tokens" not in dense.to_json()
    structure = dense.with_tokens(small_vit(), 0.5, at=(1,))
    assert structure.to_json().count("tokens") == 1
    assert Structure.from_json(structure.to_json()) == structure != dense
    assert [block.tokens for block in structure.blocks] == [None, 8, None]


def test_a_model_and_its_compacted_form_give_the_structure_back():
    model = small_vit()
    structure = Structure.random(model, 0.5, seed=1).with_tokens(model, (0.5, 0.3), at=(0, 2))
    uvc.apply_structure(model, structure)
    assert uvc.structure_of(model) == uvc.structure_of(uvc.compact(model)) == structure
    assert [block.tokens for block in structure.blocks] == [8, None, 2]


@pytest.mark.parametrize("tokens", [0, -3, 1.5, True, "8"])
def test_a_faulty_number_of_tokens_is_one_clear_line(tokens):
    with pytest.raises(ValueError, match="tokens must be a number of patch tokens, at least 1, got"):
        BlockStructure(True, True, (), (), (), (), tokens)


def test_more_tokens_than_arrive_change_nothing():
    model = small_vit()
    blocks = Structure.dense(model).blocks
    for faulty, says in (
        ((replace(blocks[0], tokens=17), *blocks[1:]), "tokens of block 0 is 17, but 16 reach it"),
        (
            (replace(blocks[0], tokens=9), blocks[1], replace(blocks[2], tokens=10)),
            "tokens of block 2 is 10, but 9 reach it",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            uvc.apply_structure(model, Structure(faulty))
    assert not any(isinstance(module, uvc.UVCAttention) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(keep=0.0), r"keep must be a fraction in \(0, 1\]"),
        (dict(keep=1.1), r"keep must be a fraction in \(0, 1\]"),
        (dict(keep=(0.5, 0.5)), "or 3 of them"),
        (dict(keep=0.5, at=(3,)), "at names block 3, the model has only 3"),
        (dict(keep=(0.5, 0.5), at=(1, 0)), "at must ascend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_faulty_wish_for_tokens_is_one_clear_line(arguments, says):
    with pytest.raises(ValueError, match=says):
        Structure.dense(small_vit()).with_tokens(small_vit(), **arguments)


def test_a_model_that_returns_every_token_keeps_them():
    model = small_vit(global_pool="", class_token=True)
    structure = Structure.dense(small_vit()).with_tokens(small_vit(), 0.5)
    with pytest.raises(ValueError, match="global_pool '' and returns every token"):
        uvc.apply_structure(model, structure)


@pytest.mark.parametrize("arguments", [dict(attn_mask=torch.ones(17, 17).bool()), dict(is_causal=True)])
def test_masks_over_tokens_that_go_are_refused(arguments):
    model = small_vit()
    uvc.apply_structure(model, Structure.dense(model).with_tokens(model, 0.5))
    for either in (model, uvc.compact(model)):
        with pytest.raises(ValueError, match="the structure drops tokens, which leaves no place for"):
            either(torch.randn(2, 3, 16, 16), **arguments)


def hold(model: nn.Module, structure: Structure) -> None:
    """Formula and flop counter agree to the integer, block by block, however the cost is asked for."""
    cost = uvc.costs.cost(model, structure)
    small = uvc.compact(uvc.apply_structure(model, structure))
    assert cost == uvc.cost(model) == uvc.cost(small)
    assert cost.macs == count_macs(small, images(model, batch=1))
    fixed = uvc.costs.prices(model, "macs").fixed
    assert cost.macs == fixed + sum(block.macs for block in cost.blocks)
    assert cost.params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_cost_is_what_the_compacted_model_counts(name):
    model = MODELS[name]()
    hold(model, Structure.random(model, 0.5, seed=3).with_tokens(model, (0.8, 0.5), at=(0, 2)))


@pytest.mark.parametrize("case", structures(small_vit()))
def test_cost_is_exact_whatever_else_goes(case):
    model = small_vit()
    hold(model, structures(model)[case].with_tokens(model, 0.6))


def test_cost_is_exact_where_nothing_but_tokens_goes_and_where_all_stay():
    model = small_vit()
    hold(small_vit(), Structure.dense(model).with_tokens(model, 0.5, at=(1,)))
    hold(small_vit(), Structure.dense(model).with_tokens(model, 1.0))


def test_a_dropped_token_is_cheaper_in_every_later_block_and_costs_one_row_where_it_is_dropped():
    model = small_vit()
    dense = uvc.cost(model)
    slim = uvc.costs.cost(model, Structure.dense(model).with_tokens(model, 0.5, at=(1,)))
    assert slim.blocks[0] == dense.blocks[0]
    N, D, A, hidden = 17, 24, 24, 40
    assert slim.blocks[1].macs == dense.blocks[1].macs + A * N - 2 * 8 * D * hidden
    assert slim.blocks[2].macs == 2 * A * (2 * 9 * D + 9 * 9) + 2 * 9 * D * hidden
    assert slim.params == dense.params


@pytest.fixture
def pruned():
    """A small ViT of which half of everything and some tokens are gone, and images for it."""
    torch.manual_seed(0)
    model = small_vit()
    structure = Structure.random(model, 0.5, seed=2).with_tokens(model, 0.6)
    return uvc.apply_structure(model, structure).eval(), torch.randn(5, 3, 16, 16)


@pytest.mark.parametrize("way", ["recompute", "checkpointing", "packing"])
def test_tokens_go_the_same_way_however_the_pass_is_run(pruned, way):
    model, x = pruned
    truth = gradients(model, model(x))
    if way == "recompute":
        uvc.layers.set_recompute(model)
    if way == "checkpointing":
        model.set_grad_checkpointing()
    with uvc_kernels.backend("cuda-host") if way == "packing" else contextlib.nullcontext():
        out = model(x)
        assert gradient_error(gradients(model, out), truth) < 1e-4


def test_under_autocast_tokens_go_and_gradients_come_back_in_float32(pruned):
    model, x = pruned
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert model.forward_features(x).shape[1] == 1 + 4
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_training_step_with_patch_dropout_keeps_what_there_is():
    model = small_vit(patch_drop_rate=0.5)
    uvc.apply_structure(model, Structure.dense(model).with_tokens(model, 0.6))
    assert model.train().forward_features(torch.randn(2, 3, 16, 16)).shape[1] == 1 + 4
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("form", ["converted", "compacted"])
def test_a_saved_model_drops_the_same_tokens_when_it_is_loaded(pruned, form, tmp_path):
    model, x = pruned
    model = uvc.compact(model) if form == "compacted" else model
    uvc.save(model, tmp_path)
    loaded = uvc.load(tmp_path)
    assert uvc.structure_of(loaded) == uvc.structure_of(model)
    assert stored(loaded) == stored(model)
    assert error(loaded(x), model(x)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_an_exported_program_drops_the_same_tokens_at_any_batch(pruned, format, tmp_path):
    model, x = pruned
    if format == "onnx":
        pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    uvc.save(uvc.compact(model), tmp_path / "run")
    target, _ = export(tmp_path / "run", format, tmp_path / "out")
    if format == "torch-export":
        assert error(torch.export.load(target).module()(x), model(x)) < 1e-5
    if format == "onnx":
        session = __import__("onnxruntime").InferenceSession(target, providers=["CPUExecutionProvider"])
        assert error(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model(x)) < 1e-4


@pytest.mark.parametrize("form", ["converted", "compacted"])
def test_compiled_without_a_graph_break_the_same_tokens_go(pruned, form):
    model, x = pruned
    model = uvc.compact(model) if form == "compacted" else model
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(x), model(x)) < 1e-5

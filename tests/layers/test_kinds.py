"""Every kind of attention and block that is served, against timm's own with contributions absent."""

import copy
import inspect
from dataclasses import replace

import pytest
import timm
import torch
from oracle import absent, error, gradient_error, gradients, images, needs_whole_naflex, stored, structures
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp
from torch.utils.data import DataLoader, TensorDataset

import uvc
from uvc.config import Config, SolverConfig
from uvc.constraints import check_multiples, limits
from uvc.costs import count_macs
from uvc.latency_table import measure
from uvc.layers import blocks_of
from uvc.layers.kinds import prunable
from uvc.solver.published import PublishedSearch
from uvc.solver.state import Geometry
from uvc.structure import Structure

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, mlp_ratio=1.25)
# Windows at the edge are padded, and the second stage is one window, which is not shifted.
STAGES = dict(
    img_size=(20, 16),
    patch_size=2,
    window_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    num_classes=5,
    mlp_ratio=1.25,
)
# The second stage pools in mask units, the third over all tokens, and each grows.
UNITS = dict(
    img_size=(32, 16),
    patch_kernel=(3, 3),
    patch_stride=(2, 2),
    patch_padding=(1, 1),
    embed_dim=8,
    num_heads=2,
    stages=(1, 2, 2),
    q_pool=2,
    mask_unit_size=(4, 4),
    mask_unit_attn=(True, False, False),
    num_classes=5,
    mlp_ratio=1.25,
)
ROPE = dict(use_rot_pos_emb=True)
FLEX = dict(img_size=None, pos_embed_grid_size=(4, 4))
FREE = {"heads": 1, "qk": 1, "v": 1, "neurons": 1}
TURNED = {**FREE, "qk": 2}
KINDS = {
    "eva": (Eva, dict(init_values=0.5), TURNED),
    "eva02": (Eva, dict(**ROPE, swiglu_mlp=True, qkv_fused=False, scale_mlp=True), TURNED | {"neurons": 0}),
    "eva02 small": (Eva, dict(**ROPE, swiglu_mlp=True), TURNED),
    "eva02 clip": (
        Eva,
        dict(**ROPE, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
        {"heads": 0, "qk": 2, "v": 0, "neurons": 0},
    ),
    "eva02 enormous": (Eva, dict(use_post_norm=True), TURNED),
    "dinov3": (
        Eva,
        dict(
            rope_type="dinov3",
            rope_rotate_half=True,
            use_abs_pos_emb=False,
            num_reg_tokens=2,
            qkv_bias=False,
            init_values=0.5,
            swiglu_mlp=True,
            swiglu_align_to=8,
            **ROPE,
        ),
        TURNED,
    ),
    "perception encoder": (Eva, dict(attn_type="rope", global_pool="map", use_fc_norm=False, **ROPE), TURNED),
    "mixed rotary positions": (
        Eva,
        dict(attn_type="rope", rope_type="mixed", class_token=False, **ROPE),
        TURNED,
    ),
    "rotary positions, q/k norms": (Eva, dict(attn_type="rope", qk_norm=True, **ROPE), {**FREE, "qk": 0}),
    "talking heads": (Cait, dict(), {**FREE, "heads": 0}),
    "geglu": (VisionTransformer, dict(mlp_layer=GeGluMlp), FREE),
    "beit": (Beit, dict(use_rel_pos_bias=True, init_values=0.5, use_abs_pos_emb=False), FREE),
    "beit, one bias for all": (Beit, dict(use_shared_rel_pos_bias=True, use_rel_pos_bias=True), FREE),
    "relative positions": (VisionTransformerRelPos, dict(rel_pos_type="bias", class_token=True), FREE),
    "relative positions by an MLP": (VisionTransformerRelPos, dict(rel_pos_dim=24), FREE),
    "relative positions, post-norm": (
        VisionTransformerRelPos,
        dict(shared_rel_pos=True, block_fn=ResPostRelPosBlock),
        FREE,
    ),
    "naflex": (NaFlexVit, dict(FLEX, init_values=0.5, act_layer="gelu_tanh"), FREE),
    "naflex, rotary positions": (
        NaFlexVit,
        dict(FLEX, rope_type="axial", global_pool="avg", reg_tokens=2, swiglu_mlp=True),
        TURNED,
    ),
    "swin": (SwinTransformer, STAGES, FREE),
    "swin, window sizes of its own in each stage": (
        SwinTransformer,
        dict(STAGES, window_size=((5, 4), (3, 2)), head_dim=(6, 4), qkv_bias=False, strict_img_size=False),
        FREE,
    ),
    "swin v2": (SwinTransformerV2, STAGES, {**FREE, "qk": 0}),
    "swin v2, positions of larger windows": (
        SwinTransformerV2,
        dict(STAGES, pretrained_window_sizes=(6, 6), always_partition=True, qkv_bias=False),
        {**FREE, "qk": 0},
    ),
    "swin v2, norms of stages": (
        SwinTransformerV2Cr,
        dict(STAGES, extra_norm_stage=True, img_size=(24, 16)),
        {**FREE, "qk": 0},
    ),
    "hiera": (Hiera, UNITS, FREE),
    "hiera, all attend to all, growing without a projection": (
        Hiera,
        dict(UNITS, mask_unit_attn=(False, False, False), use_expand_proj=False, init_values=0.5, q_pool=1),
        FREE,
    ),
    "relative positions, q/k norms": (VisionTransformerRelPos, dict(qk_norm=True), {**FREE, "qk": 0}),
}


def made(name: str) -> torch.nn.Module:
    """A small model of the kind, in evaluation, all its weights random."""
    cls, own, _ = KINDS[name]
    if name.startswith(("naflex", "swin")):
        needs_whole_naflex()  # Swin grew its arguments in the same versions
    takes = inspect.signature(cls).parameters
    if own.keys() - takes.keys() and "kwargs" not in takes:
        pytest.skip(f"the {cls.__name__} of this timm takes no {', '.join(own)}")
    torch.manual_seed(5)
    model = cls(**(own if own.keys() & {"depths", "stages"} else {**SIZES, **own})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_model_is_the_timm_one_bit_for_bit(name):
    model = made(name)
    x, keys = images(model), list(model.state_dict())
    expected = model(x)
    assert torch.equal(uvc.convert(model)(x), expected)
    assert list(model.state_dict()) == keys
    offered = {**KINDS[name][2], "halves": ("attn", "mlp")}
    assert uvc.families(model) == [offered] * len(blocks_of(model))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:UVC")
def test_outputs_gradients_costs_and_files_are_those_of_dense_with_contributions_absent(name, tmp_path):
    model = made(name).double()
    x = images(model, dtype=torch.float64)
    if name == "mixed rotary positions":
        try:
            model(x)
        except RuntimeError as error_of_timm:
            pytest.skip(f"this timm turns by mixed positions in float32 alone: {error_of_timm}")
    for i, (kind, structure) in enumerate(structures(model).items()):
        truth = absent(model, structure)(x)
        expected = gradients(model, truth)
        pruned = uvc.apply_structure(copy.deepcopy(model), structure)
        out = pruned(x)
        assert uvc.structure_of(pruned) == structure
        assert error(out, truth) < 1e-10, kind
        assert gradient_error(gradients(pruned, out), expected) < 1e-9, kind
        small, cost = uvc.compact(pruned), uvc.cost(pruned)
        assert error(small(x), truth) < 1e-10, kind
        assert cost.macs == count_macs(small, x[:1]), kind
        assert cost.params == sum(p.numel() for p in small.parameters()), kind
        if i < 2:
            for saved in (small, pruned):
                uvc.save(saved, tmp_path)
                loaded = uvc.load(tmp_path)
                assert stored(loaded) == stored(saved)
                assert error(loaded(x), truth) < 1e-10


@pytest.mark.parametrize("name", ["eva02", "dinov3", "beit", "relative positions", "swin", "hiera"])
@pytest.mark.filterwarnings("ignore:UVC")
def test_children_that_are_more_than_linear_layers_are_called_on_all_heads(name):
    model = made(name).double()
    structure, x = Structure.random(model, 0.5, seed=2), images(model, dtype=torch.float64)
    for block in blocks_of(model):
        linears = [block.attn.proj, *(m for n in ("qkv", "q_proj") if (m := getattr(block.attn, n, None)))]
        for linear in linears:
            linear.register_forward_hook(lambda module, inputs, out: out * 1.5)
    truth = absent(model, structure)(x)
    assert error(uvc.apply_structure(copy.deepcopy(model), structure)(x), truth) < 1e-10


def test_tokens_stay_where_positions_are_part_of_the_attention():
    model = made("eva02")
    with pytest.raises(
        ValueError, match="tokens: positions are part of UVCEvaAttention, so none can be left out"
    ):
        uvc.apply_structure(uvc.convert(model), Structure.dense(model).with_tokens(model, 0.5))


@pytest.mark.parametrize("name", ["eva02 small", "dinov3", "beit", "geglu", "talking heads", "swin", "hiera"])
@pytest.mark.filterwarnings("ignore:UVC")
def test_a_search_meets_the_budget_and_keeps_pairs_whole(name):
    model = made(name)
    data = TensorDataset(images(model, 16), torch.randint(5, (16,)))
    loader = DataLoader(data, batch_size=8)
    config = replace(Config(), warmup_epochs=1, search_epochs=4, post_epochs=1)
    result = uvc.compress(model, loader, loader, budget=0.6, config=config)
    assert 0.56 < result.cost.macs / result.dense_cost.macs <= 0.6
    pairs, ragged = blocks_of(result.model)[0].attn.pairs(), False
    for block in result.structure.blocks:
        for dims in block.qk_dims if block.attn and pairs is not None else ():
            assert {tuple(pair) for pair in pairs.tolist() if set(pair) & set(dims)} == {
                tuple(pair) for pair in pairs.tolist() if set(pair) <= set(dims)
            }
            ragged |= len(dims) < len(pairs) * 2
    assert ragged or pairs is None


def uneven() -> torch.nn.Module:
    """A ViT whose second block has other heads, head dims and neurons than the first."""
    torch.manual_seed(5)
    model = VisionTransformer(**SIZES)
    model.blocks[1] = VisionTransformer(**{**SIZES, "num_heads": 2, "mlp_ratio": 2}).blocks[1]
    return model.eval()


@pytest.mark.filterwarnings("ignore:UVC")
def test_a_vit_with_blocks_of_several_sizes_is_pruned_compacted_and_compressed():
    model = uneven().double()
    x = images(model, dtype=torch.float64)
    for kind, structure in structures(model).items():
        truth = absent(model, structure)(x)
        expected = gradients(model, truth)
        pruned = uvc.apply_structure(copy.deepcopy(model), structure)
        out, cost = pruned(x), uvc.cost(pruned)
        small = uvc.compact(pruned)
        assert uvc.structure_of(pruned) == structure
        assert error(out, truth) < 1e-10 and error(small(x), truth) < 1e-10, kind
        assert gradient_error(gradients(pruned, out), expected) < 1e-9, kind
        assert cost.macs == count_macs(small, x[:1]), kind
    model = uneven()
    loader = DataLoader(TensorDataset(images(model, 16), torch.randint(5, (16,))), batch_size=8)
    config = replace(Config(), warmup_epochs=1, search_epochs=4, post_epochs=1)
    result = uvc.compress(model, loader, loader, budget=0.6, config=config)
    assert 0.56 < result.cost.macs / result.dense_cost.macs <= 0.6


@pytest.mark.parametrize("name", ["swin", "hiera"])
@pytest.mark.filterwarnings("ignore:UVC")
def test_stages_keep_to_their_tolerance_in_float32(name):
    model = made(name)
    x, structure = images(model), Structure.random(model, 0.5, seed=1)
    truth = absent(model, structure)(x)
    expected = gradients(model, truth)
    pruned = uvc.apply_structure(copy.deepcopy(model), structure)
    out = pruned(x)
    assert error(out, truth) < 1e-5
    assert gradient_error(gradients(pruned, out), expected) < 1e-5


def test_a_latency_table_and_the_published_method_say_that_they_know_one_size():
    model = uvc.convert(made("swin"))
    with pytest.raises(ValueError, match="latency table: the model has several stages"):
        measure(model)
    with pytest.raises(ValueError, match="latency table: blocks of this model differ in size"):
        measure(uneven())
    with pytest.raises(ValueError, match="method published: blocks of this model differ in size"):
        PublishedSearch.check(uneven(), limits(uneven(), 0.5), SolverConfig())


def test_an_odd_multiple_of_dims_is_refused_where_these_go_in_pairs():
    model = timm.create_model("eva02_tiny_patch14_224", depth=1, embed_dim=36, num_heads=3, img_size=28)
    check_multiples(model, (4, 1))
    with pytest.raises(ValueError, match="round_to: 3 dims are no whole pairs"):
        check_multiples(model, (3, 1))


@pytest.mark.parametrize("layout", ["neighbours", "halves"])
def test_groups_of_pairs_are_spread_over_their_dims_and_summed_from_them(layout):
    geometry = Geometry(2, 3, 8, 10, layout)
    assert geometry.segments("qk") == (6, 4) and geometry.segments("v") == (6, 8)
    pairs = made("eva02 small" if layout == "neighbours" else "dinov3").blocks[0].attn
    pairs = prunable(pairs).pairs()
    groups = torch.arange(24.0).view(6, 4)
    spread = geometry.spread("qk", groups)
    assert spread.shape == (2, 3, 8)
    for i, pair in enumerate(pairs.tolist()):
        assert torch.equal(spread[..., pair].flatten(0, 1), groups[:, i, None].expand(-1, 2))
    assert torch.equal(geometry.gathered("qk", spread), 2 * groups)

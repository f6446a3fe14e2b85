"""timm's vision transformers: each works from end to end, or is refused with the layer and the reason."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from imports import ROOT
from oracle import MODELS, TOLERANCE, error, images, needs_whole_naflex, stored
from served import EXAMPLES, gemma
from torch.utils.data import DataLoader, TensorDataset

import uvc
import uvc.models
from uvc.compaction import in_form
from uvc.config import Config
from uvc.costs import count_macs
from uvc.layers import blocks_of, set_image, takes_any_size, trunk_of
from uvc.structure import Structure

NARROW = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
STAGES = dict(depths=(2, 2), embed_dim=24, num_heads=(3, 6), num_classes=5)
# One name for each kind of stem, tokens, pooling, normalisation and MLP.
SERVED = {
    "deit_tiny_patch16_224": dict(img_size=32),
    "deit_base_distilled_patch16_224": dict(img_size=32),
    "deit3_small_patch16_224": dict(img_size=32),
    "vit_tiny_patch16_224": dict(img_size=32),
    "vit_small_patch32_384": dict(img_size=64),
    "vit_base_patch16_clip_quickgelu_224": dict(img_size=32),
    "vit_base_patch16_siglip_224": dict(img_size=32),
    "vit_base_patch16_siglip_gap_224": dict(img_size=32),
    "vit_base_patch16_rpn_224": dict(img_size=32),
    "vit_betwixt_patch16_reg4_gap_256": dict(img_size=32),
    "vit_mediumd_patch16_reg4_gap_256": dict(img_size=32),
    "vit_small_patch14_reg4_dinov2": dict(img_size=28),
    "vit_base_patch16_xp_224": dict(img_size=32),
    "vit_dpwee_patch16_reg1_gap_256": dict(img_size=32),
    "vit_small_patch16_18x2_224": dict(img_size=32),
    "vit_giant_patch14_dinov2": dict(img_size=28),
    "vit_giant_patch14_reg4_dinov2": dict(img_size=28),
    "vit_base_patch16_224_miil": dict(img_size=32),
    "vit_so150m_patch16_reg4_map_256": dict(img_size=32),
    "vit_tiny_r_s16_p8_224": dict(img_size=128),
    "vit_base_mci_224": dict(img_size=32, embed_dim=768, num_heads=12),
    "aimv2_large_patch14_224": dict(img_size=28),
    "beit3_base_patch16_224": dict(img_size=32),
    "eva_giant_patch14_224": dict(img_size=28),
    "eva02_tiny_patch14_224": dict(img_size=28),
    "eva02_base_patch14_224": dict(img_size=28),
    "eva02_base_patch16_clip_224": dict(img_size=32),
    "vit_small_patch16_dinov3": dict(img_size=32),
    "vit_huge_plus_patch16_dinov3": dict(img_size=32),
    "vit_base_patch16_rope_mixed_224": dict(img_size=32),
    "vit_large_patch16_sapiens2": dict(img_size=32, num_kv_heads=(3, 1)),
    "vit_dwee_patch16_reg1_gap_256": dict(img_size=32),
    "vit_pe_core_tiny_patch16_384": dict(img_size=32, attn_pool_num_heads=3),
    "beitv2_base_patch16_224": dict(img_size=32),
    "vit_relpos_small_patch16_rpn_224": dict(img_size=32),
    "vit_relpos_base_patch16_clsgap_224": dict(img_size=32),
    "vitamin_small_224": dict(img_size=32, embed_dim=384, num_heads=6),
    "cait_xxs24_224": dict(img_size=32),
    "naflexvit_base_patch16_siglip": dict(pos_embed_grid_size=(4, 4)),
    "naflexvit_base_patch16_radio_v3": dict(pos_embed_grid_size=(8, 8)),
    "swin_tiny_patch4_window7_224": dict(img_size=64, window_size=4, **STAGES),
    "swinv2_tiny_window8_256": dict(img_size=64, window_size=4, **STAGES),
    "swinv2_cr_tiny_ns_224": dict(img_size=64, window_size=4, **STAGES),
    "swin_s3_tiny_224": dict(img_size=64, window_size=(4, 2), **STAGES),
    "samvit_base_patch16": dict(img_size=80, window_size=3, global_attn_indexes=(1,)),
    "hiera_tiny_224": dict(img_size=(64, 64), embed_dim=24, num_heads=3, stages=(1, 1, 1, 1), num_classes=5),
    "gemma4_vit_167m": dict(head_dim=16, intermediate_size=96, position_embedding_size=64),
    "sam2_hiera_tiny": dict(embed_dim=24, stages=(1, 1, 2, 1), global_att_blocks=(3,), num_classes=5),
    "test_vit": dict(img_size=32),
    "t2t_vit_14": dict(img_size=32),
    "t2t_vit_t_24": dict(img_size=48),
    "uvc_vit_digits": dict(img_size=8),
}
REFUSED = {
    "convit_tiny": r"blocks\.0 is a Block of convit, and its attention adds gated positions",
    "crossvit_9_240": r"blocks\.0 is a MultiScaleBlock of crossvit, and it has branches of several widths",
    "mixer_s16_224": r"blocks\.0 is a MixerBlock of mlp_mixer, and it mixes tokens without attention",
    "pit_ti_224": r"the model is a PoolingVisionTransformer of pit, and its tokens are pooled .*; heads",
    "tnt_s_patch16_224": r"blocks\.0 is a Block of tnt, and it holds a transformer for each patch",
    "volo_d1_224": r"the model is a VOLO of volo, and its first stage attends by outlook",
    "xcit_nano_12_p16_224": r"blocks\.0 is a XCABlock of xcit, and it attends between channels, not tokens",
}


def smaller_images(model: torch.nn.Module) -> None:
    """Costs and tests of a model for images of any size are of smaller ones."""
    sizes = {"HieraDet": 224, "Gemma4VitEncoder": 96}
    if side := sizes.get(type(trunk_of(model)).__name__):
        set_image(model, (3, side, side))


@pytest.mark.parametrize("name", SERVED)
def test_a_served_model_works_from_end_to_end(name, tmp_path):
    if name not in timm.list_models():
        pytest.skip("this timm has no such model")
    if name.startswith(("naflexvit", "swin")):
        needs_whole_naflex()  # Swin grew its arguments in the same versions
    own = SERVED[name]
    model = timm.create_model(name, **(own if own.keys() & {"depths", "stages"} else {**NARROW, **own}))
    model.eval().requires_grad_(False)
    if takes_any_size(model):
        smaller_images(model)
    x, keys = images(model), list(model.state_dict())
    with torch.no_grad():
        # Some start with layer scales or heads of zero, behind which nothing shows.
        for block in (*blocks_of(model), *getattr(model, "blocks_token_only", ())):
            for parameter in block.parameters():
                parameter.normal_(std=0.3)
        heads = model.get_classifier()  # two of a distilled model
        for head in heads if isinstance(heads, tuple) else (heads,):
            getattr(head, "fc", head).weight.normal_()
        before = model(x)
        assert torch.equal(uvc.convert(model)(x), before)
        assert list(model.state_dict()) == keys
        uvc.apply_structure(model, Structure.random(model, 0.5, seed=1))
        out = model(x)
        small = uvc.compact(model)
        assert error(out, before) > 1e-3
        assert error(small(x), out) < 1e-5
        padded = uvc.compact(model, "padded")
        assert error(padded(x), out) < 1e-5
        assert stored(in_form(small, "padded")) == stored(padded)
        uvc.save(small, tmp_path)
        loaded = uvc.load(tmp_path)
        assert stored(loaded) == stored(small)
        assert error(loaded(x), small(x)) < TOLERANCE[x.dtype]
    cost = uvc.cost(model)
    assert count_macs(small, x[:1]) == cost.macs
    assert cost.params == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_the_layer_and_the_reason(name):
    if name not in timm.list_models():
        pytest.skip("this timm has no such model")
    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        uvc.convert(model)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys


# Of timm's files of transformers, as the table of docs/models.md counts them.
TABLE = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", (ROOT / "docs" / "models.md").read_text(), re.M)


def narrow(name: str) -> torch.nn.Module:
    """A model of two narrow blocks, or what its function makes instead, in evaluation with random blocks."""
    heads = [{"attn_pool_num_heads": 3}, {}, {"num_kv_heads": (3, 1)}]
    swin = dict(depths=(1, 1, 2, 1), embed_dim=24, num_heads=(3, 3, 6, 6), num_classes=5)
    hiera = dict(stages=(1, 1, 2, 1), embed_dim=24, num_heads=1, num_classes=5)
    for arguments in (*({**NARROW, **own} for own in heads), swin, hiera, dict(depth=2, num_classes=5), {}):
        try:
            model = timm.create_model(name, **arguments).eval().requires_grad_(False)
        except (TypeError, AssertionError, RuntimeError, ValueError):
            continue
        for block in blocks_of(model):
            for parameter in block.parameters():
                parameter.normal_(std=0.3)
        return model
    raise AssertionError(f"{name} cannot be made")


COUNTED = {file: timm.list_models(module=file) for file, _, _ in TABLE}


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the table counts timm 1.0.31")
def test_the_table_counts_what_is_served():
    for file, served, of in TABLE:
        assert int(served) == int(of) == len(COUNTED[file]), file
    total = sum(int(served) for _, served, _ in TABLE)
    for page, says in (
        ("docs/models.md", f"Beside these {total} there"),
        ("README.md", f"{total} of timm's"),
    ):
        assert says in (ROOT / page).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for names in COUNTED.values() for name in names])
@pytest.mark.filterwarnings("ignore:UVC", "ignore:Seen")
@torch.no_grad()
def test_a_counted_model_is_pruned_compacted_saved_and_loaded(name, tmp_path):
    model = narrow(name)
    if takes_any_size(model):
        smaller_images(model)
    x = images(model, 1)
    uvc.apply_structure(model, Structure.random(model, 0.5, seed=1))
    out, small = model(x), uvc.compact(model)
    assert error(small(x), out) < 1e-4
    uvc.save(small, tmp_path)
    assert error(uvc.load(tmp_path)(x), out) < 1e-4
    assert uvc.cost(model).params == sum(p.numel() for p in small.parameters())


# Deep enough for the stem, which stays, to be less than the budget.
T2T = dict(img_size=32, depth=8, embed_dim=192, num_heads=3, num_classes=5)
COMPRESSED = {
    **{name: MODELS[name] for name in ("deit distilled", "swiglu", "packed swiglu", "glu, gate last")},
    "gemma": gemma,
    "t2t performer": lambda: timm.create_model("t2t_vit_14", **T2T),
    "t2t transformer": lambda: timm.create_model("t2t_vit_t_14", **T2T),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressing_ends_below_the_budget_with_a_model_that_can_be_loaded(name, tmp_path):
    model = COMPRESSED[name]()
    data = TensorDataset(images(model, 16), torch.randint(5, (16,)))
    loader = DataLoader(data, batch_size=8)
    config = replace(Config(), warmup_epochs=1, search_epochs=4, post_epochs=1)
    result = uvc.compress(model, loader, loader, budget=0.6, config=config, out=tmp_path)
    assert 0.5 < result.cost.macs / result.dense_cost.macs <= 0.6
    loaded, x = uvc.load(tmp_path), images(model)
    assert error(loaded(x), result.model(x)) < 1e-5
    assert uvc.cost(loaded) == result.cost


@pytest.mark.parametrize(
    "name", ["gemma", "differential attention", "parallel halves, differential attention"]
)
def test_where_v_dims_are_tied_a_search_removes_whole_heads(name):
    model = EXAMPLES[name].make()
    data = TensorDataset(images(model, 16), torch.randint(5, (16,)))
    loader = DataLoader(data, batch_size=8)
    config = replace(Config(), warmup_epochs=0, search_epochs=2, post_epochs=1)
    dense = Structure.dense(model).blocks
    found = uvc.compress(model, loader, loader, budget=0.35, config=config).structure.blocks
    assert any(
        block.attn and len(block.heads) < len(whole.heads) for block, whole in zip(found, dense, strict=True)
    )
    assert all(dims == dense[0].v_dims[0] for block in found for dims in block.v_dims)

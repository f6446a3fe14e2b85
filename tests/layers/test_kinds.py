"""What kinds of attention and block need of the rest: pairs, stages, blocks of several sizes."""

import copy
import warnings
from dataclasses import replace

import other_models
import pytest
import timm
import torch
import uvc_kernels
from oracle import absent, error, gradient_error, gradients, images, structures
from served import SIZES, made
from timm.models.vision_transformer import VisionTransformer
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


@pytest.mark.parametrize("name", ["eva02", "dinov3", "beit", "relative positions", "swin", "torchvision"])
def test_positions_are_part_of_the_kernel_on_a_cpu_and_elsewhere_plain_torch_says_so(name, monkeypatch):
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    model = other_models.made(name) if name == "torchvision" else made(name)
    x = images(model) if name != "torchvision" else other_models.images(model)
    uvc.apply_structure(model, Structure.random(model, 0.5, seed=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(x)
    with (
        uvc_kernels.backend("reference"),
        pytest.warns(UserWarning, match="is outside the fast op; plain torch computes the kept heads"),
    ):
        assert error(model(x), out) < 1e-5


def test_tokens_stay_where_positions_are_part_of_the_attention():
    model = made("eva02")
    with pytest.raises(
        ValueError, match="tokens: positions are part of UVCEvaAttention, so none can be left out"
    ):
        uvc.apply_structure(uvc.convert(model), Structure.dense(model).with_tokens(model, 0.5))


@pytest.mark.parametrize(
    "name",
    [
        "eva02 small",
        "dinov3",
        "beit",
        "geglu",
        "talking heads",
        "swin",
        "hiera",
        "parallel halves",
        "parallel halves, one last product",
    ],
)
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


@pytest.mark.filterwarnings("ignore:UVC")
@pytest.mark.parametrize("form", ["on the fly", "compacted"])
def test_a_vit_whose_blocks_no_constructor_makes_is_not_saved_and_the_block_is_named(form, tmp_path):
    model = uvc.apply_structure(uneven(), Structure.random(uneven(), 0.5, seed=1))
    with pytest.raises(ValueError, match=r"cannot save: blocks\.1\.attn has num_heads 2, timm makes 4"):
        uvc.save(model if form == "on the fly" else uvc.compact(model), tmp_path)
    assert not list(tmp_path.iterdir())


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

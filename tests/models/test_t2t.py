"""T2T-ViT: what the published code computes, what stays fixed, and what cannot be asked of it."""

import copy

import pytest
import timm
import torch
from oracle import T2T, error, images, small_vit

import uvc
from uvc.costs import count_macs
from uvc.models import T2TVisionTransformer
from uvc.models.t2t import TokenAttention, TokenPerformer, TokensToToken

FORMS = ["performer", "transformer"]

# What the published code answers for the weights and the image of `waves`.
PUBLISHED_LOGITS = {
    "performer": [-1.760879, 2.954744, -2.800758, -0.737295, 4.763981],
    "transformer": [1.426158, 4.507905, -3.151232, 0.467304, 3.46156],
}


def small(form: str = "performer", **changes) -> torch.nn.Module:
    return small_vit(T2TVisionTransformer, **{**T2T, "form": form, **changes})


def waves(model: torch.nn.Module) -> torch.Tensor:
    """Fills the weights with sines, so that they are the same everywhere; returns an image of sines."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad or name.endswith(".w"):
                wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i).view(p.shape)
                scale = 1.0 if p.dim() == 1 else p.shape[-1] ** -0.5
                p.copy_(scale * wave + (name.endswith("weight") and p.dim() == 1))
    return torch.sin(0.3 * torch.arange(3 * 64 * 64, dtype=torch.float64)).view(1, 3, 64, 64).float()


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_the_published_code_computes(form):
    shape = dict(img_size=64, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    name = "t2t_vit_14" if form == "performer" else "t2t_vit_t_14"
    model = timm.create_model(name, **shape).eval()
    assert type(model) is T2TVisionTransformer
    assert error(model(waves(model))[0], torch.tensor(PUBLISHED_LOGITS[form])) < 1e-5


def test_the_performer_is_attention_with_a_kernel_of_positive_features():
    layer, x = TokenPerformer(20, 8).double().eval(), torch.randn(2, 7, 20, dtype=torch.float64)
    k, q, v = layer.kqv(layer.norm1(x)).chunk(3, dim=-1)
    truth = torch.empty_like(v)
    for b in range(2):
        for i in range(7):
            # sum_j kernel(q_i, k_j) v_j / sum_j kernel(q_i, k_j), with the constant factors left out
            kernel = [
                ((layer.w @ q[b, i] - q[b, i].dot(q[b, i]) / 2).exp())
                @ (layer.w @ k[b, j] - k[b, j].dot(k[b, j]) / 2).exp()
                for j in range(7)
            ]
            truth[b, i] = sum(kernel[j] * v[b, j] for j in range(7)) / sum(kernel)
    truth = v + layer.proj(truth)
    truth = truth + layer.mlp(layer.norm2(truth))
    assert error(layer(x), truth) < 1e-7


def test_the_random_features_are_orthogonal_and_as_long_as_published():
    w = TokenPerformer(20, 64).w.detach()
    assert w.shape == (32, 64)
    assert error(w @ w.T, 32 * torch.eye(32)) < 1e-5


def test_the_token_attention_is_softmax_attention_with_the_value_added():
    layer, x = TokenAttention(20, 8).double(), torch.randn(2, 7, 20, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    truth = v + layer.proj((q @ k.mT / 20**0.5).softmax(-1) @ v)
    assert error(layer(x), truth) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_runs_in_other_dtypes(form, dtype):
    model = small(form).eval()
    x = images(model)
    out = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert error(out.float(), model(x)) < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_the_performers_exponentials_stay_in_float32_under_autocast():
    layer, x = TokenPerformer(20, 8).eval(), torch.randn(2, 7, 20)
    with torch.no_grad():
        layer.kqv.weight.mul_(8)  # exponents beyond the range of float16
    exact = layer(x)
    with torch.autocast("cpu", torch.float16):
        out = layer(x)
    assert exact.isfinite().all() and out.isfinite().all()
    assert error(out, exact) < 0.3


def test_positions_and_random_features_are_not_trained():
    model = small()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    stem = "tokens_to_token.attention"
    assert frozen == {"pos_embed", f"{stem}1.w", f"{stem}2.w"}
    model.set_input_size((32, 32))
    assert not model.pos_embed.requires_grad


def test_resetting_the_weights_gives_a_new_model_of_the_same_kind():
    model = small()
    positions, w = model.pos_embed.clone(), model.patch_embed.attention1.w.clone()
    model.init_weights()
    assert torch.equal(
        model.pos_embed, T2TVisionTransformer(**T2T, embed_dim=24, depth=1, num_heads=4).pos_embed
    )
    assert not torch.equal(w, model.patch_embed.attention1.w) and model(images(model)).isfinite().all()
    assert positions.shape == model.pos_embed.shape


@pytest.mark.parametrize("size", [(224, 224), (48, 32), (40, 72)])
def test_the_number_of_tokens_is_what_the_stem_makes(size):
    stem = TokensToToken(size, embed_dim=24)
    assert stem(torch.randn(1, 3, *size)).shape == (1, stem.num_patches, 24)
    assert stem.num_patches == stem.grid_size[0] * stem.grid_size[1]


def test_another_input_size_can_be_set():
    model = small()
    model.set_input_size((64, 80))
    assert model(torch.randn(1, 3, 64, 80)).isfinite().all()
    assert model.pos_embed.shape[1] == 4 * 5 + 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: small(form="convolution"), "form must be one of performer, transformer, got 'convolution'"),
        (lambda: small(patch_size=8), "patch_size of a token-to-token stem must be 16, got 8"),
        (
            lambda: small()(torch.zeros(1, 3, 32, 48)),
            r"the images are \[32, 48\], the model takes \[48, 32\]",
        ),
        (lambda: timm.create_model("t2t_vit_14", pretrained=True), "pretrained=True.*checkpoint_path="),
        (lambda: small(dynamic_img_size=True), "dynamic_img_size must be False"),
        (lambda: small(dynamic_img_pad=True), "dynamic_img_pad must be False"),
    ],
    ids=["form", "patch size", "image size", "pretrained", "dynamic size", "dynamic padding"],
)
def test_what_it_cannot_do_is_one_clear_line(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_timm_knows_its_input():
    found = timm.get_pretrained_cfg("t2t_vit_t_19")
    assert (found.input_size, found.crop_pct, found.interpolation) == ((3, 224, 224), 0.9, "bicubic")


@pytest.mark.parametrize("form", FORMS)
def test_the_stem_is_counted_as_torch_counts_it(form):
    model = small(form, img_size=64).eval()
    stem = model.patch_embed
    assert count_macs(model, images(model, 1)) == uvc.cost(model).macs
    N, M, C = 16 * 16, 32, 64
    narrow = N * (C * C * 3) + N * 147 * 192  # projection, MLP; q, k and v
    attention = {"performer": 2 * N * M * C + 2 * N * M * C + N * M, "transformer": 2 * N * N * C}
    assert count_macs(stem.attention1, torch.randn(1, N, 147)) == narrow + attention[form]


def test_parameters_of_the_stem_are_matched_by_timms_groups():
    import re

    stem = re.compile(small().group_matcher()["stem"])
    assert stem.match("tokens_to_token.project.weight") and stem.match("pos_embed")
    assert not stem.match("blocks.0.norm1.weight")

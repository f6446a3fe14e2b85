"""T2T-ViT-14, -19 and -24, registered with timm: timm's VisionTransformer behind a token-to-token stem.

Source: "Tokens-to-Token ViT" (ICCV 2021, arXiv 2101.11986). State_dict names and shapes, and what is computed
from them, are those of the published checkpoints, which `timm.create_model(name, checkpoint_path=...)` loads
strictly. The blocks are timm's and are what UVC compresses; the stem stays dense.

B batch, N tokens, I input width, C token width, M random features, D width.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = [
    "T2TVisionTransformer",
    "t2t_vit_14",
    "t2t_vit_19",
    "t2t_vit_24",
    "t2t_vit_t_14",
    "t2t_vit_t_19",
    "t2t_vit_t_24",
]

# Kernel, stride and padding of the three soft splits; together they divide the image by 16.
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
TOKEN_DIM = 64
PERFORMER_DROP = 0.1  # fixed in the published models, whatever their other dropout


class TokenPerformer(nn.Module):
    """One head of linear attention with positive random features, then an MLP: x [B, N, I] -> [B, N, C].

    The value is the skip connection of the attention, as the width changes. The features `w` [M, C] with
    M = C / 2 are drawn once and not trained.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.dp = nn.Dropout(PERFORMER_DROP)
        self.proj = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(in_dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(PERFORMER_DROP)
        )
        self.w = nn.Parameter(torch.empty(dim // 2, dim), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the random features: orthogonal rows of length sqrt(M)."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(len(self.w)))

    def features(self, x: Tensor) -> Tensor:
        """exp(w x - |x|^2 / 2) / sqrt(M) [B, N, M]; their products estimate exponentials of dot products."""
        w = self.w.to(x.dtype)
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, I] -> [B, N, C]; the attention itself is computed in float32 at least."""
        kqv = self.kqv(self.norm1(x))
        k, q, v = kqv.to(torch.promote_types(kqv.dtype, torch.float32)).chunk(3, dim=-1)
        # In half precision the exponentials overflow. Meta tensors, whose cost is counted, know no autocast.
        known = torch.amp.is_autocast_available(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext():
            k, q = self.features(k), self.features(q)
            sums = q @ k.sum(1).unsqueeze(-1)  # [B, N, 1]
            y = q @ (k.transpose(1, 2) @ v) / (sums + 1e-8)  # [B, N, C]
        x = v.to(kqv.dtype) + self.dp(self.proj(y.to(kqv.dtype)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Softmax attention of one head of width C on inputs of width I, with the value as skip connection."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.scale = in_dim**-0.5
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, I] -> [B, N, C]."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return (v + self.proj(out)).squeeze(1)


class TokenMlp(nn.Module):
    """Two linear layers of one width with a GELU between them."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        return self.fc2(self.act(self.fc1(x)))


class TokenTransformer(nn.Module):
    """A transformer block that narrows: x [B, N, I] -> [B, N, C]."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(in_dim), TokenAttention(in_dim, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), TokenMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, I] -> [B, N, C]."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


FORMS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Images [B, in_chans, *img_size] -> tokens [B, num_patches, embed_dim], in place of a patch embedding.

    Three soft splits into overlapping windows, an attention layer of the given form after the first two, and
    a projection after the third. Takes what timm's VisionTransformer hands to its `embed_layer`, of which
    `dynamic_img_pad` has no effect.
    """

    patch_size = (16, 16)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        form: str = "performer",
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if patch_size not in (16, (16, 16)):
            raise ValueError(f"patch_size of a token-to-token stem must be 16, got {patch_size!r}")
        self.form = form
        self.set_input_size(img_size)
        self.attention1 = FORMS[form](in_chans * SPLITS[0][0] ** 2, TOKEN_DIM)
        self.attention2 = FORMS[form](TOKEN_DIM * SPLITS[1][0] ** 2, TOKEN_DIM)
        self.project = nn.Linear(TOKEN_DIM * SPLITS[2][0] ** 2, embed_dim, bias=bias)
        self.to(device=device, dtype=dtype)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Take images of another size; as in timm, None keeps what there is."""
        if patch_size not in (None, 16, (16, 16)):
            raise ValueError(f"patch_size of a token-to-token stem must be 16, got {patch_size!r}")
        if img_size is not None:
            self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
            self.grids = []
            size = self.img_size
            for kernel, stride, padding in SPLITS:
                size = tuple((s + 2 * padding - kernel) // stride + 1 for s in size)
                self.grids.append(size)
            self.grid_size, self.num_patches = size, size[0] * size[1]

    def feat_ratio(self) -> int:
        """How many pixels a token is wide."""
        return 16

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W] -> [B, num_patches, D]; ValueError for images of another size."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"the images are {list(x.shape[-2:])}, the model takes {list(self.img_size)}")
        x = self.attention1(soft_split(x, 0))
        x = self.attention2(soft_split(x.transpose(1, 2).unflatten(2, self.grids[0]), 1))
        return self.project(soft_split(x.transpose(1, 2).unflatten(2, self.grids[1]), 2))


def soft_split(x: Tensor, number: int) -> Tensor:
    """The overlapping windows of x [B, C, H, W] as tokens [B, N, C * kernel^2]."""
    kernel, stride, padding = SPLITS[number]
    return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)


def sinusoids(positions: int, dim: int) -> Tensor:
    """The fixed position encoding [1, positions, dim]: a sine and a cosine of each angle in turn."""
    place = torch.arange(dim, dtype=torch.float64, device="cpu")
    rate = 10000.0 ** (-2 * (place // 2) / dim)
    angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * rate
    return torch.where(place % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


class T2TVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with a token-to-token stem `form` ("performer" or "transformer").

    The stem is `tokens_to_token` in the state_dict and also answers to `patch_embed`. Positions are fixed
    sinusoids, unless `pos_embed` is "none".
    """

    def __init__(self, *args, form: str = "performer", **kwargs):
        for name in ("dynamic_img_size", "dynamic_img_pad"):
            if kwargs.get(name):
                raise ValueError(f"{name} must be False: a token-to-token stem has one input size")
        super().__init__(*args, embed_layer=functools.partial(TokensToToken, form=form), **kwargs)
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)

    def __setattr__(self, name: str, value: object) -> None:
        # timm's constructor calls the stem patch_embed, the published checkpoints tokens_to_token.
        super().__setattr__("tokens_to_token" if name == "patch_embed" else name, value)

    @property
    def patch_embed(self) -> TokensToToken:
        """The stem, under timm's name."""
        return self.tokens_to_token

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, then the published one of positions and class token."""
        super().init_weights(mode, needs_reset)
        with torch.no_grad():
            if self.pos_embed is not None:
                self.pos_embed.copy_(sinusoids(*self.pos_embed.shape[1:]))
            if self.cls_token is not None:
                nn.init.trunc_normal_(self.cls_token, std=0.02)

    def set_input_size(self, *args, **kwargs) -> None:
        """timm's; what its older versions forget is whether positions are trained."""
        trained = self.pos_embed is not None and self.pos_embed.requires_grad
        super().set_input_size(*args, **kwargs)
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(trained)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's groups of parameters for layer-wise settings, with the stem under its own name."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": groups["stem"] + "|tokens_to_token"}


_SHAPE = dict(mlp_ratio=3.0, qkv_bias=False, norm_layer=functools.partial(nn.LayerNorm, eps=1e-5))
_SHAPES = {
    "14": dict(embed_dim=384, depth=14, num_heads=6),
    "19": dict(embed_dim=448, depth=19, num_heads=7),
    "24": dict(embed_dim=512, depth=24, num_heads=8),
}
_INPUT = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    fixed_input_size=True,
    interpolation="bicubic",
    crop_pct=0.9,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    first_conv=None,
    classifier="head",
)

# timm's register_model looks for the entries of this module under this name.
default_cfgs = generate_default_cfgs({name: _INPUT for name in __all__[1:]})


def _build(name: str, form: str, pretrained: bool, kwargs: dict) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"pretrained=True: timm hosts no weights of {name}; download the published file of the T2T-ViT "
            "authors and name it with checkpoint_path="
        )
    shape = {**_SHAPE, **_SHAPES[name.rpartition("_")[2]], "form": form}
    return build_model_with_cfg(T2TVisionTransformer, name, pretrained=False, **{**shape, **kwargs})


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs) -> nn.Module:
    """T2T-ViT-14 with performer stem: 21.5 million parameters. Keyword arguments as for VisionTransformer."""
    return _build("t2t_vit_14", "performer", pretrained, kwargs)


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs) -> nn.Module:
    """T2T-ViT-19 with performer stem: 39.2 million parameters."""
    return _build("t2t_vit_19", "performer", pretrained, kwargs)


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs) -> nn.Module:
    """T2T-ViT-24 with performer stem: 64.1 million parameters."""
    return _build("t2t_vit_24", "performer", pretrained, kwargs)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs) -> nn.Module:
    """T2T-ViT_t-14, with transformer stem: 21.5 million parameters."""
    return _build("t2t_vit_t_14", "transformer", pretrained, kwargs)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs) -> nn.Module:
    """T2T-ViT_t-19, with transformer stem: 39.2 million parameters."""
    return _build("t2t_vit_t_19", "transformer", pretrained, kwargs)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs) -> nn.Module:
    """T2T-ViT_t-24, with transformer stem: 64.1 million parameters."""
    return _build("t2t_vit_t_24", "transformer", pretrained, kwargs)

"""Two small vision transformers for 8x8 grey images, registered with timm.

16 patches of 2x2 pixels and a class token (and a distillation token), width 96, 6 blocks, 3 heads of 32 dims,
384 hidden neurons: about 0.67 million parameters and 11 million multiply-accumulates per image. Both are
timm's own classes, so whatever holds for DeiT holds for them.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

__all__ = ["uvc_vit_digits", "uvc_vit_digits_distilled"]

_SHAPE = dict(
    img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=6, num_heads=3, mlp_ratio=4.0, weight_init="jax"
)

_INPUT = dict(
    num_classes=10,
    input_size=(1, 8, 8),
    fixed_input_size=True,
    interpolation="bilinear",
    crop_pct=1.0,
    mean=(0.5,),
    std=(0.5,),
    first_conv="patch_embed.proj",
    license="mit",
)

# timm's register_model looks for the entries of this module under this name.
default_cfgs = generate_default_cfgs(
    {
        "uvc_vit_digits": dict(_INPUT, classifier="head"),
        "uvc_vit_digits_distilled": dict(_INPUT, classifier=("head", "head_dist")),
    }
)


def _build(model_class: type[nn.Module], name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    if pretrained:
        raise ValueError(f"pretrained=True: {name} has no published weights; train it with `uvc compress`")
    model = build_model_with_cfg(model_class, name, pretrained=False, **{**_SHAPE, **kwargs})
    if model.pos_embed is not None and not model.pos_embed.is_meta:
        # timm's 0.02 hides the positions behind the patches for many epochs; at 1 a few suffice: 86 -> 97%
        # in 20 epochs.
        nn.init.normal_(model.pos_embed, std=1.0)
    return model


@register_model
def uvc_vit_digits(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT for float images [B, 1, 8, 8]; logits [B, 10]. Keyword arguments go to timm's VisionTransformer."""
    return _build(VisionTransformer, "uvc_vit_digits", pretrained, kwargs)


@register_model
def uvc_vit_digits_distilled(pretrained: bool = False, **kwargs) -> nn.Module:
    """As `uvc_vit_digits`, with DeiT's distillation token and second head."""
    return _build(VisionTransformerDistilled, "uvc_vit_digits_distilled", pretrained, kwargs)

"""What a model takes: how large its images are, and so how many tokens reach its blocks.

The size is that of the stem; of a model that takes images of any size, that of its `pretrained_cfg`.
"""

import math
from typing import Any

from timm.models.hiera import Hiera
from timm.models.naflexvit import NaFlexVit
from torch import nn

Image = tuple[int, int, int]


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model, a dict or an object in timm; empty if there is none."""
    cfg = getattr(model, "pretrained_cfg", None)
    return dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg or {})


def stem_of(model: nn.Module) -> nn.Module:
    """The module that makes tokens of images."""
    return model.embeds if isinstance(model, NaFlexVit) else model.patch_embed


def takes_any_size(model: nn.Module) -> bool:
    """Whether a model takes images of any size, so that its cost is that of a size that is stated."""
    return isinstance(model, NaFlexVit)


def image_of(model: nn.Module) -> Image | None:
    """Channels, height and width of the images that costs are counted for; None without a size."""
    if isinstance(model, Hiera):
        sides = zip(model.tokens_spatial_shape, model.patch_stride, strict=True)
        return (model.in_chans, *(n * stride for n, stride in sides))
    if not takes_any_size(model):
        size = stem_of(model).img_size
        return None if size is None else (model.in_chans, *size)
    size = cfg_of(model).get("input_size")
    if size is None and (grid := stem_of(model).pos_embed_grid_size) is not None:
        size = (0, *(n * patch for n, patch in zip(grid, stem_of(model).patch_size, strict=True)))
    return None if size is None else (model.in_chans, *size[1:])


def patches_of(model: nn.Module) -> int | None:
    """Patch tokens of such an image."""
    if isinstance(model, Hiera):
        return math.prod(model.tokens_spatial_shape)
    if not takes_any_size(model):
        stem = stem_of(model)
        return None if stem.img_size is None else stem.num_patches
    size = image_of(model)
    return None if size is None else math.prod(stem_of(model).dynamic_feat_size(size[1:]))


def set_tokens(model: nn.Module, tokens: int) -> nn.Module:
    """Let costs of a model that takes images of any size be counted for so many patch tokens of an image.

    In place: `pretrained_cfg` then has the image of so many patches that is closest to a square. ValueError
    for another number than its own where a model takes images of one size.
    """
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens_per_image: {tokens!r}; give a number of patch tokens, 1 or more")
    own = patches_of(model)
    if tokens == own:
        return set_image(model, image_of(model)) if takes_any_size(model) else model
    if not takes_any_size(model):
        raise ValueError(
            f"tokens_per_image: {tokens}, but the {type(model).__name__} takes images of one size, which are "
            f"{own or 'no stated number of'} tokens; make the model with another img_size"
        )
    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    height, width = stem_of(model).patch_size
    return set_image(model, (model.in_chans, rows * height, tokens // rows * width))


def set_image(model: nn.Module, size: Image) -> nn.Module:
    """Let costs of a model that takes images of any size be counted for this one, in place."""
    model.pretrained_cfg = model.default_cfg = {**cfg_of(model), "input_size": tuple(size)}
    return model

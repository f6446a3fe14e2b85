"""What a model takes: how large its images are, and so how many tokens reach its blocks.

The size is that of the stem; of a model that takes images of any size, that of its `pretrained_cfg`.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from timm.models.cait import Cait
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexVit
from torch import nn

from uvc.layers.compact_block import CompactBlock
from uvc.layers.kinds import MODELS, timm_classes
from uvc.layers.other_blocks import layout_of
from uvc.layers.stages import lists_of

Image = tuple[int, int, int]
ANY_SIZE = (NaFlexVit, HieraDet, *timm_classes("gemma4_vit", "Gemma4VitEncoder"))


class Facts(NamedTuple):
    """What a model of transformers or torchvision says of its images: their size, and that of a patch."""

    image: Image
    patch: tuple[int, int]
    registers: int


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model, a dict or an object in timm; empty if there is none."""
    cfg = getattr(model, "pretrained_cfg", None)
    return dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg or {})


def facts_of(model: nn.Module) -> Facts | None:
    """The facts of a model of transformers or torchvision; None of any other."""
    package = type(model).__module__.partition(".")[0]
    if package == "torchvision" and hasattr(model, "conv_proj"):
        size, patch = _pair(model.image_size), _pair(model.patch_size)
        return Facts((next(model.conv_proj.parameters()).shape[1], *size), patch, 0)
    if package != "transformers" or getattr(model, "main_input_name", "") != "pixel_values":
        return None
    config = model.config
    if not all(hasattr(config, name) for name in ("image_size", "patch_size", "num_channels")):
        return None
    size, patch = _pair(config.image_size), _pair(config.patch_size)
    return Facts((config.num_channels, *size), patch, getattr(config, "num_register_tokens", 0))


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    return tuple(size) if isinstance(size, Iterable) else (size, size)


def is_served(model: nn.Module) -> bool:
    """Whether a model is of a class whose images are understood."""
    return isinstance(model, MODELS) or facts_of(model) is not None


def trunk_of(model: nn.Module) -> nn.Module:
    """The model of a class that is served: the one given, or what it holds around its blocks."""
    trunk = model
    for name in next(iter(lists_of(model)), "").split("."):
        if is_served(trunk):
            return trunk
        trunk = getattr(trunk, name, trunk)
    return model


def stem_of(model: nn.Module) -> nn.Module:
    """The module that makes tokens of images, or a model that begins with it."""
    trunk = trunk_of(model)
    return trunk.embeds if isinstance(trunk, NaFlexVit) else getattr(trunk, "patch_embed", trunk)


def prefix_of(model: nn.Module) -> int:
    """Tokens before the patches in the blocks; CaiT's class token is in later blocks alone."""
    trunk = trunk_of(model)
    if (facts := facts_of(trunk)) is not None:
        block = next(iter(lists_of(trunk).values()))[0]
        return layout_of(block.origin if isinstance(block, CompactBlock) else block).prefix + facts.registers
    return 0 if isinstance(trunk, Cait) else getattr(trunk, "num_prefix_tokens", 0)


def takes_any_size(model: nn.Module) -> bool:
    """Whether a model takes images of any size, so that its cost is that of a size that is stated."""
    return isinstance(trunk_of(model), ANY_SIZE)


def image_of(model: nn.Module) -> Image | None:
    """Channels, height and width of the images that costs are counted for; None without a size."""
    trunk = trunk_of(model)
    if (facts := facts_of(trunk)) is not None:
        return facts.image
    if isinstance(trunk, Hiera):
        sides = zip(trunk.tokens_spatial_shape, trunk.patch_stride, strict=True)
        return (trunk.in_chans, *(n * stride for n, stride in sides))
    if not takes_any_size(trunk):
        size = stem_of(trunk).img_size
        return None if size is None else (trunk.in_chans, *size)
    size = cfg_of(stated(model)).get("input_size")
    grid = getattr(stem_of(trunk), "pos_embed_grid_size", None)
    if size is None and grid is not None:
        size = (0, *(n * patch for n, patch in zip(grid, stem_of(trunk).patch_size, strict=True)))
    return None if size is None else (trunk.in_chans, *size[1:])


def patches_of(model: nn.Module) -> int | None:
    """Patch tokens of such an image."""
    trunk = trunk_of(model)
    if (facts := facts_of(trunk)) is not None:
        return math.prod(size // patch for size, patch in zip(facts.image[1:], facts.patch, strict=True))
    if isinstance(trunk, Hiera):
        return math.prod(trunk.tokens_spatial_shape)
    if not takes_any_size(trunk):
        stem = stem_of(trunk)
        return None if stem.img_size is None else stem.num_patches
    size = image_of(model)
    if size is not None and not isinstance(trunk, NaFlexVit | HieraDet):
        return math.prod(n // patch for n, patch in zip(size[1:], stem_of(trunk).patch_size, strict=True))
    if isinstance(trunk, HieraDet) and size is not None:
        stem = trunk.patch_embed.proj
        sides = zip(size[1:], stem.padding, stem.kernel_size, stem.stride, strict=True)
        return math.prod((n + 2 * padding - kernel) // stride + 1 for n, padding, kernel, stride in sides)
    return None if size is None else math.prod(stem_of(trunk).dynamic_feat_size(size[1:]))


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
    stem = stem_of(model)
    height, width = stem.proj.stride if isinstance(trunk_of(model), HieraDet) else stem.patch_size
    return set_image(model, (image_of(model)[0], rows * height, tokens // rows * width))


def set_image(model: nn.Module, size: Image) -> nn.Module:
    """Let costs of a model that takes images of any size be counted for this one, in place."""
    holder = stated(model)
    holder.pretrained_cfg = holder.default_cfg = {**cfg_of(holder), "input_size": tuple(size)}
    return model


def stated(model: nn.Module) -> nn.Module:
    """What states the size of images: timm's model, or the one that is found in a wrapper."""
    theirs = any(kind.__module__.startswith("timm.") for kind in type(model).__mro__)
    return model if theirs else trunk_of(model)

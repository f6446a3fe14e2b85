"""In which dtype a model takes its images, and whether it runs at all in the ones it has."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from uvc.layers import image_of


def input_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's first layer wants its images in."""
    stem = getattr(model, "patch_embed", getattr(model, "embeds", model))
    floats = [p.dtype for p in (*stem.parameters(), *model.parameters()) if p.is_floating_point()]
    return floats[0]


def sample_images(model: nn.Module, batch: int) -> Tensor:
    """Images [batch, C, H, W] from -2 to 2, of the model's size, dtype and device; the same each time."""
    size = image_of(model)
    if size is None:
        raise ValueError("the model has no input size of its own; give it an img_size")
    x = torch.linspace(-2, 2, batch * math.prod(size), device="cpu")
    first = next(model.parameters())
    return x.view(batch, *size).to(first.device, input_dtype(model))


def check_runs(model: nn.Module) -> None:
    """ValueError, naming two tensors, for a model that mixes dtypes in a way that torch does not compute."""
    kinds = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            kinds.setdefault(tensor.dtype, name)
    if len(kinds) < 2:
        return
    try:
        with torch.no_grad():
            model(sample_images(model, 1))
    except RuntimeError as error:
        mixed = " and ".join(f"{str(d).removeprefix('torch.')} ({name})" for d, name in kinds.items())
        said = str(error).splitlines()[0]
        raise ValueError(
            f"the model mixes {mixed}, which torch does not compute ({said}); save it in one"
        ) from None

"""Batches of (images, labels): what they may be, and top-1 accuracy over a loader of them.

B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from uvc.io.dtypes import input_dtype


def unpack(batch: Any, loader: str) -> tuple[Tensor, Tensor]:
    """Images, floating, and labels of a batch; ValueError, naming the loader, for any other batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"a {type(batch).__name__}" + (
            f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        )
        raise ValueError(f"{loader}: a batch is {found}; it must be (images, labels)")
    images, labels = batch
    for name, part in (("images", images), ("labels", labels)):
        if not isinstance(part, Tensor):
            raise ValueError(f"{loader}: {name} are a {type(part).__name__}; give tensors")
    if not images.is_floating_point():
        raise ValueError(f"{loader}: images are {_kind(images)}; give normalised floating-point images")
    if images.dim() == 0 or labels.dim() == 0 or len(images) != len(labels):
        raise ValueError(f"{loader}: a batch has images {list(images.shape)} but labels {list(labels.shape)}")
    return images, labels


def check_size(model: nn.Module, images: Tensor, loader: str) -> None:
    """ValueError, naming the loader, unless images are of the channels and the size that a timm ViT takes."""
    channels, stem = getattr(model, "in_chans", None), getattr(model, "patch_embed", None)
    if channels is None:
        return
    size = getattr(stem, "img_size", None) if getattr(stem, "strict_img_size", False) else None
    found = tuple(images.shape[1:])
    if len(found) != 3 or found[0] != channels or found[1:] != tuple(size or found[1:]):
        wanted = [channels, *(size or "HW")]
        raise ValueError(
            f"{loader}: images are {list(images.shape)}, the model takes [B, {', '.join(map(str, wanted))}]; "
            "prepare them so, or make the model for them"
        )


def targets(labels: Tensor, classes: int, loader: str) -> Tensor:
    """Labels as cross-entropy takes them: int64 [B], or floating probabilities [B, C].

    labels: integer classes [B]; or [B, C], one-hot or probabilities, of any dtype. Everything else is a
    ValueError that names the loader. Values are looked at on the CPU only: elsewhere that would wait for the
    device.
    """
    look = labels.device.type == "cpu" and labels.numel() > 0
    whole = not labels.is_floating_point() and not labels.is_complex()
    if labels.dim() == 1 and whole and labels.dtype != torch.bool:
        if look and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"{loader}: labels are {found}, but the model has classes 0 to {classes - 1}")
        return labels.long()
    if labels.dim() != 2 or labels.shape[1] != classes or labels.is_complex():
        raise ValueError(
            f"{loader}: labels are {_kind(labels)}; give classes as integers [B], or one-hot or soft labels "
            f"[B, {classes}]"
        )
    soft = labels if labels.is_floating_point() else labels.float()
    if look and not bool(((soft.float().sum(1) - 1).abs() < 1e-2).all() & (soft >= 0).all()):
        raise ValueError(
            f"{loader}: labels [B, {classes}] must be probabilities: at least 0, their sum 1 for each image"
        )
    return soft


def count_right(
    model: nn.Module,
    loader: Iterable,
    device: torch.device | str | None = None,
    total: Callable[[list[int]], list[int]] = list,
) -> tuple[int, int]:
    """How many images of ``loader`` the model answers right, and how many there are, each counted once.

    total: adds up over the processes that share the loader.
    The model runs in eval mode, on images in its own dtype; its mode is restored. A soft label asks for its
    most probable class. ValueError for labels that do not fit the model, RuntimeError for logits that are not
    finite: neither has an accuracy.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if first is None else input_dtype(model)
    device = device or ("cpu" if first is None else first.device)
    was_training = model.training
    model.eval()
    right = seen = 0
    try:
        with torch.no_grad():
            for number, batch in enumerate(loader):
                images, labels = unpack(batch, "val_loader")
                check_size(model, images, "val_loader")
                logits = model(images.to(device, dtype))
                if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
                    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                    raise ValueError(f"model: it returns {found}, not logits [{len(images)}, classes]")
                labels = targets(labels, logits.shape[1], "val_loader").to(device)
                labels = labels.argmax(1) if labels.dim() == 2 else labels
                # One look at the device per batch.
                found, finite = torch.stack(
                    [(logits.argmax(1) == labels).sum(), logits.isfinite().all().long()]
                ).tolist()
                if not finite:
                    raise RuntimeError(
                        f"val_loader: batch {number}: the model's logits are NaN or infinite, so "
                        "there is no accuracy; look for such values in its weights and in these images"
                    )
                right, seen = right + found, seen + len(images)
    finally:
        model.train(was_training)
    right, seen = total([right, seen])
    if seen == 0:
        raise ValueError("val_loader: it yields no images; top-1 needs at least one")
    return right, seen


def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device | str | None = None,
    total: Callable[[list[int]], list[int]] = list,
) -> float:
    """Top-1 accuracy in percent over ``loader``; see ``count_right``."""
    right, seen = count_right(model, loader, device, total)
    return 100.0 * right / seen


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

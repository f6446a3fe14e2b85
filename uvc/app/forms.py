"""Which form of a compacted model's blocks is faster on a device: measured block by block, in turns.

B batch, N tokens, D width.
"""

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from uvc_kernels.timing import milliseconds, take_turns

from uvc.compaction import forms_of, in_form
from uvc.costs import count_macs, flop_counter
from uvc.io.dtypes import input_dtype
from uvc.latency_table import quiet_clock
from uvc.layers import FORMS, blocks_of, entries_of, image_of, is_compacted, listed


class Timed(NamedTuple):
    """One block in each form: multiply-accumulates of the batch, milliseconds.

    `chosen` is None where nothing differs; then there is nothing to measure.
    """

    chosen: str | None
    macs: dict[str, int]
    ms: dict[str, float]


class Choice(NamedTuple):
    """A compacted model in its faster forms, and what was measured; times are of forward passes of a batch.

    `before`, `after`: milliseconds of the model as it was and as it is now, `ratio` the median over turns.
    MACs are those executed on one image. Where the faster blocks made no faster model, it is as it was.
    """

    model: nn.Module
    blocks: tuple[Timed, ...]
    before_macs: int
    after_macs: int
    before_ms: float
    after_ms: float
    ratio: float


def choose(small: nn.Module, batch: int = 1, rounds: int = 20, seconds: float = 5.0) -> Choice:
    """Times each block of a compacted model in every form, and takes the faster.

    On random images of the model's own size, on its device, with torch's present number of threads. Each
    measurement takes `rounds` turns, or ends after `seconds`. The model itself is untouched.
    """
    if not is_compacted(small):
        raise ValueError("choose: the model is not compacted; give what uvc.compact returns")
    if (size := image_of(small)) is None:
        raise ValueError("choose: the model has no input size of its own; give it an img_size")
    device = next(small.parameters()).device
    images = torch.randn(batch, *size, device=device, dtype=input_dtype(small))
    was, training = forms_of(small), small.training
    old = in_form(small, was).eval()
    forms = [in_form(old, form) for form in FORMS]
    timed = tuple(
        _timed([blocks_of(model)[i] for model in forms], call, rounds, seconds)
        for i, call in enumerate(_calls(old, images))
    )
    new = in_form(old, [t.chosen or form for t, form in zip(timed, was, strict=True)])
    old_ms, new_ms = _measured([old, new], ((images,), {}), rounds, seconds)
    ratio = median(after / before for after, before in zip(new_ms, old_ms, strict=True))
    if forms_of(new) == was or ratio >= 1.0:
        new, new_ms, ratio = old, old_ms, 1.0
    macs = [count_macs(model, images[:1]) for model in (old, new)]
    return Choice(new.train(training), timed, *macs, median(old_ms), median(new_ms), ratio)


def _calls(model: nn.Module, images: Tensor) -> list[tuple[tuple, dict[str, Any]]]:
    """The arguments with which each block is called on these images, or what it is one of several in."""
    found, handles, blocks = [], [], listed(model).values()
    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
            )
        )
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [call for block, call in zip(blocks, found, strict=True) for _ in entries_of(block)]


def _timed(
    blocks: Sequence[nn.Module], call: tuple[tuple, dict[str, Any]], rounds: int, seconds: float
) -> Timed:
    """One block in all forms."""
    shapes = [[p.shape for p in block.parameters()] for block in blocks]
    groups = [getattr(block._modules.get("attn"), "groups", ()) for block in blocks]
    if all((g, s) == (groups[0], shapes[0]) for g, s in zip(groups, shapes, strict=True)):
        return Timed(None, {}, {})
    times = _measured(blocks, call, rounds, seconds)
    macs = []
    for block in blocks:
        with flop_counter() as counter, torch.no_grad():
            block(*call[0], **call[1])
        macs.append(counter.get_total_flops() // 2)
    first, *others = times
    ratios = [1.0] + [median(a / b for a, b in zip(other, first, strict=True)) for other in others]
    chosen = FORMS[ratios.index(min(ratios))]
    return Timed(
        chosen, dict(zip(FORMS, macs, strict=True)), dict(zip(FORMS, map(median, times), strict=True))
    )


def _measured(
    models: Sequence[nn.Module], call: tuple[tuple, dict[str, Any]], rounds: int, seconds: float
) -> list[list[float]]:
    """Milliseconds of each model called so, by turns."""
    device = next(models[0].parameters()).device
    timers = {str(i): partial(_ms, model, call, device) for i, model in enumerate(models)}
    with torch.inference_mode():
        return list(take_turns(timers, rounds, 2, seconds).values())


def _ms(model: nn.Module, call: tuple[tuple, dict[str, Any]], device: torch.device) -> float:
    return milliseconds(lambda: model(*call[0], **call[1]), device, quiet_clock(device))

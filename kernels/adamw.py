"""One step of AdamW for many matrices, in one call, that passes over long runs of rows at rest.

A row is at rest when it is pruned and zero in its weights and averages: its gradient is zero too, so that
every step leaves it as it is. Of the other rows every bit is that of torch's fused AdamW. Runs shorter than
two pages are stepped with what surrounds them: a processor reads streams faster than it skips.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _dispatch

STEPPED, AT_REST, REMOVED = range(
    3
)  # what `rows` says of a row; a removed one is looked at, and may be at rest


def adamw_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rows: Sequence[Tensor],
    steps: Sequence[float],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """Torch's own, over every row."""
    counts = [torch.tensor(float(step), device=w.device) for step, w in zip(steps, weights, strict=True)]
    torch._fused_adamw_(
        list(weights), list(grads), list(exp_avgs), list(exp_avg_sqs), [], counts, lr=lr, beta1=betas[0],
        beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _adamw_cpu(weights, grads, exp_avgs, exp_avg_sqs, rows, steps, lr, betas, weight_decay, eps) -> None:
    torch.ops.uvc_kernels.adamw(
        weights, grads, exp_avgs, exp_avg_sqs, rows, steps, lr, *betas, weight_decay, eps
    )


@functools.cache
def passes_over_rows() -> bool:
    """Whether the op is there and gives, here, the bits of the installed torch: its rounding is its own."""
    if _dispatch.extension_error is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(24, 64, generator=generator) for _ in range(2))
    results = []
    for run in (adamw_reference, _adamw_cpu):
        state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
        for step in range(1, 4):
            w, first, second = ([t] for t in state)
            stepped = [torch.zeros(len(start), dtype=torch.uint8)]
            run(w, [grad / step**3], first, second, stepped, [float(step)], 1e-3, (0.9, 0.999), 0.05, 1e-8)
        results.append(state)
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rows: Sequence[Tensor],
    steps: Sequence[float],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
) -> None:
    """Step `weights` and their averages in place.

    weights, grads, exp_avgs, exp_avg_sqs: lists of contiguous float32 matrices [n, m] on the CPU; rows: uint8
    [n] each, in which the op makes REMOVED rows AT_REST where all is zero; steps: of each, this one included.
    Torch's own op steps all rows where `passes_over_rows` says no or another backend is forced.
    """
    lists = tuple(map(list, (weights, grads, exp_avgs, exp_avg_sqs, rows)))
    forced = _dispatch.forced("adamw", torch.device("cpu"), torch.float32)
    run = _adamw_cpu if forced in (None, "cpu") and passes_over_rows() else adamw_reference
    run(*lists, [float(step) for step in steps], lr, betas, weight_decay, eps)


_dispatch.provide_reference("adamw", adamw_reference)
if _dispatch.extension_error is None:
    torch.library.register_fake("uvc_kernels::adamw", lambda *arguments: None)
    _dispatch.provide("adamw", "cpu", _adamw_cpu, "cpu", (torch.float32,))

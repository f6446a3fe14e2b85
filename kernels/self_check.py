"""One small call of each op, judged against float64: what a kernel must pass before it serves on a device."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._autograd import apart
from ._dispatch import backend, provide_check
from .attention import attention
from .attention_with_positions import Positions, attention_with_positions, turn_of
from .gather import gather
from .group_scores import group_scores
from .indices import kept_heads, kept_neurons
from .mlp import mlp
from .prox_shrink import prox_shrink

# What rounding alone may add to an error, relative to the largest entry.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _tensors(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Halves of bfloat16's digits, so that every dtype sees the same numbers.
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16() for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def _with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    (cotangent,) = _tensors(output.device, output.dtype, tuple(output.shape))
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.detach())]


def _heads(device: torch.device) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Numbers of images and tokens, and what is kept of some heads: q/k dims and v dims."""
    # One head keeps most of its dims, one keeps few, one is removed.
    mask = torch.arange(192).view(3, 64) % 3 > 0
    mask[1], mask[2, 20:] = False, False
    yield 2, 70, mask.roll(1, 1), mask
    # The sizes of DeiT, plain and distilled: more than 48 KB of shared memory, tiles of every kind; on a GPU
    # also one that streams in every kernel.
    sizes = ((197, 64), (198, 128), *(((577, 64),) if device.type == "cuda" else ()))
    for tokens, dims in sizes:
        whole = torch.ones(2, dims, dtype=torch.bool)
        # A kernel may do a whole head in one block only where there are heads for all multiprocessors.
        images = _multiprocessors(device) if tokens == 197 else 1
        yield images, tokens, whole, whole & (torch.arange(2 * dims).view(2, dims) < dims + 24)


def _multiprocessors(device: torch.device) -> int:
    gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1


def _attention(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for images, tokens, qk, v in _heads(device):
        A = v.numel()
        inputs = _tensors(device, dtype, (images, tokens, 24), (3 * A, 24), (3 * A,), (24, A), (24,))
        results += _with_gradients(attention(*inputs, kept_heads(qk, v, device), 0.01), inputs)
    return results


def _attention_with_positions(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for images, tokens, qk, v in _heads(device):
        A, (H, K) = v.numel(), v.shape
        partner = torch.arange(K).roll(K // 2)
        kept = kept_heads(qk & qk[:, partner], v, device)
        few = tokens < 100
        # Tables of every image and head, and a bias of every image; or one table for all, and one bias.
        tables, P = ((images, H, tokens - 1, K), images) if few else ((tokens - 1, K), 1)
        angles = _tensors(torch.device("cpu"), torch.float64, tables)[0].detach()
        turn = turn_of(angles.sin(), angles.cos(), partner, 1).to(device, dtype)
        shapes = (images, tokens, 24), (3 * A, 24), (3 * A,), (24, A), (24,)
        *inputs, bias = _tensors(device, dtype, *shapes, (P, len(kept.table), tokens, tokens))
        positions = Positions(turn, partner.to(device), bias)
        out = attention_with_positions(*inputs, kept, 0.01, positions)
        results += _with_gradients(out, [*inputs, bias])
    return results


def _mlp(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _tensors(device, dtype, (2, 17, 24), (40, 24), (40,), (24, 40), (24,), (40, 24), (40,))
    kept = kept_neurons(torch.arange(40) % 3 == 0, device)
    plain = _with_gradients(mlp(*inputs[:5], kept), inputs[:5])
    return plain + _with_gradients(mlp(*inputs[:5], kept, "silu", *inputs[5:]), inputs)


def _gather(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    sources = _tensors(device, dtype, (40, 24), (40,), (24, 40))
    kept = kept_neurons(torch.arange(40) % 3 == 0, device)
    packed = gather(sources, [kept.rows] * 3, [kept.whole] * 3, [0, 0, 1])
    return [
        result for pair in zip(packed, sources, strict=True) for result in _with_gradients(pair[0], [pair[1]])
    ]


def _group_scores(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    a, b, c = (tensor.detach() for tensor in _tensors(device, dtype, (12, 20), (12, 20), (12,)))
    return [group_scores([a, a, c], [b, b, c], [0, 1, 0])]


def _prox_shrink(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    weights = [tensor.detach() for tensor in _tensors(device, dtype, (12, 20), (12, 20), (12,))]
    factors = torch.arange(12 + 20 + 12).remainder(5).div(4).to(device)
    prox_shrink(weights, factors, [0, 1, 0])
    return weights


EXAMPLES: dict[str, Callable[[torch.device, torch.dtype], list[Tensor]]] = {
    "attention": _attention,
    "attention_with_positions": _attention_with_positions,
    "mlp": _mlp,
    "gather": _gather,
    "group_scores": _group_scores,
    "prox_shrink": _prox_shrink,
}


def errors(op: str, provider: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The worst error of `provider` on the example of `op`, and the worst share of what is allowed.

    Errors are relative to the largest entry of each result. Allowed is twice the error of the plain-torch
    reference in the same dtype on the same device, plus some rounding. RuntimeError, as of a forced backend,
    when the provider cannot serve.
    """
    example = EXAMPLES[op]
    # The caller may be in inference mode, under autocast or gradient checkpointing, have a default device of
    # its own, or count calls.
    autocast_off = torch.autocast(device.type, enabled=False)
    quiet = _disable_current_modes()
    with quiet, torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), autocast_off, apart():
        with backend("reference"):
            # On the same device, whose size decides the example's.
            exact = example(device, torch.float64)
            plain = example(device, dtype)
        with backend(provider):
            found = example(device, dtype)
    worst, shares = 0.0, [0.0]
    for error, usual in zip(_relative(found, exact), _relative(plain, exact), strict=True):
        worst = max(worst, error)
        shares.append(error / (2 * usual + FLOOR[dtype]))
    return worst, max(shares)


def _relative(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    scaled = ((a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True))
    return [float(error.nan_to_num(float("inf"))) for error in scaled]


def fault(op: str, provider: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when `provider` computes `op` correctly on `device`, else the error."""
    try:
        error, share = errors(op, provider, device, dtype)
    except Exception as failure:  # a compiler or a driver may raise anything
        return f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"
    return None if share <= 1 else f"its error is {error:.1e}, {share:.1f} times what is allowed"


provide_check(fault)

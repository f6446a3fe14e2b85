"""What positions cost in the CPU's attention op: its time with rotary tables, or a bias, over that without.

    rotary    sine and cosine of every patch, made ready for the op in each call
    bias      one [1, h, N, N] for all images; trained: with its gradient

All are timed in turn in one process, forward, and forward and backward; each ratio is the median over rounds.

python bench/positions.py [--batch 8] [--keep 0.5] [--dtype float32] [--threads 1] [--seconds 20]
                          [--clock process]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor
from uvc_kernels import Positions, attention, attention_with_positions, backend, kept_heads, turn_of
from uvc_kernels.timing import milliseconds, take_turns

from uvc.environment import device_name

# Tokens, those before the patches, width, heads.
SHAPES = {"DeiT-S": (197, 1, 384, 6), "DINOv3-S": (201, 5, 384, 6)}
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}  # the second on a busy machine
CPU = torch.device("cpu")


def units(heads: int, dims: int, keep: float) -> tuple[Tensor, Tensor]:
    """Masks [H, K] of q/k dims in pairs, and of v dims, drawn at random."""
    pairs = torch.rand(heads, dims // 2).argsort(1).argsort(1) < round(keep * dims / 2)
    return pairs.repeat(1, 2), torch.rand(heads, dims).argsort(1).argsort(1) < round(keep * dims)


def calls(shape: str, batch: int, keep: float, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The op's forward pass without positions, and with each kind of them."""
    N, first, D, H = SHAPES[shape]
    K = D // H
    qk, v = units(H, K, keep)
    kept = kept_heads(qk, v, CPU)
    x, out_bias = torch.randn(batch, N, D), torch.randn(D)
    qkv, qkv_bias, proj = torch.randn(3 * D, D) * D**-0.5, torch.randn(3 * D), torch.randn(D, D) * D**-0.5
    weights = [t.to(dtype).requires_grad_() for t in (x, qkv, qkv_bias, proj, out_bias)]
    angles = torch.rand(N - first, K // 2).repeat(1, 2)
    sine, cosine, partner = angles.sin(), angles.cos(), torch.arange(K).roll(K // 2)
    bias = torch.randn(1, H, N, N)
    trained = bias.clone().requires_grad_()

    def turned() -> Tensor:
        turn = turn_of(sine, cosine, partner, first)
        return attention_with_positions(*weights, kept, K**-0.5, Positions(turn, partner))

    return {
        "none": partial(attention, *weights, kept, K**-0.5),
        "rotary": turned,
        "bias": partial(attention_with_positions, *weights, kept, K**-0.5, Positions(bias=bias)),
        "trained bias": partial(attention_with_positions, *weights, kept, K**-0.5, Positions(bias=trained)),
    }


def step(call: Callable[[], Tensor]) -> None:
    """Forward and backward."""
    call().sum().backward()


def forward(call: Callable[[], Tensor]) -> None:
    """Forward alone."""
    with torch.no_grad():
        call()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, for every row")
    parser.add_argument("--clock", choices=CLOCKS, default="process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{device_name(CPU)}, torch {torch.__version__}, batch {options.batch}, keep {options.keep:g}, "
        f"{options.dtype}, {options.threads} threads, {options.clock} time\n"
    )
    print(
        "| shape | pass | without, ms | rotary | bias | trained bias | rounds |", "|---" * 7 + "|", sep="\n"
    )
    for shape in SHAPES:
        ready = calls(shape, options.batch, options.keep, getattr(torch, options.dtype))
        for name, run in (("forward", forward), ("both", step)):
            timers = {
                kind: lambda call=call, run=run: milliseconds(lambda: run(call), CPU, CLOCKS[options.clock])
                for kind, call in ready.items()
            }
            with backend("cpu"):
                found = take_turns(timers, 10_000, 3, options.seconds)
            ratios = (
                median(a / b for a, b in zip(found[kind], found["none"], strict=True))
                for kind in ("rotary", "bias", "trained bias")
            )
            cells = (f"{ratio:.3f}" for ratio in ratios)
            print(
                "|",
                " | ".join([shape, name, f"{median(found['none']):.2f}", *cells, str(len(found["none"]))]),
                "|",
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Training steps as fractions of one another on this processor: many sizes, one table.

    fly / dense, fly / compacted    skipped on the fly, by the dense and by the compacted model's step
    search / compacted              the same with the solver beside it
    converted / dense               nothing pruned

All are timed in turn in one process, as bench/README.md says; below 1 the first is faster.

python bench/ratios.py [--models deit_tiny_patch16_224 ...] [--tokens 197 ...] [--batch 8 ...] [--threads 1 2]
                       [--dtype float32 bfloat16] [--keep 0.5] [--seconds 30] [--clock wall]
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Sequence

import timm
import torch

from uvc.bench.steps import images_and_labels, searching, training
from uvc.bench.timing import Round, ratio
from uvc.bench.variants import build
from uvc.environment import device_name

PIXELS = {17: 64, 37: 96, 65: 128, 197: 224, 577: 384}  # patches of 16 pixels and a class token
RATIOS = (("fly", "dense"), ("fly", "compacted"), ("search", "compacted"), ("converted", "dense"))
FEWEST = 5  # rounds
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}  # the second on a busy machine


def measure(model: str, tokens: int, batch: int, dtype: torch.dtype, options: argparse.Namespace) -> str:
    """One row of the table: milliseconds of the dense step, then the ratios with their noise."""
    cpu = torch.device("cpu")
    dense = timm.create_model(model, img_size=PIXELS[tokens])
    built, left = build(
        model, options.keep, batch, cpu, ("dense", "converted", "on_the_fly", "compacted"), dense
    )
    if left:
        raise RuntimeError("; ".join(f"{variant}: {reason}" for variant, reason in left))
    x, y = images_and_labels(dense, batch, cpu)
    models = {variant: one.model for variant, one in built.items()}
    steps = {
        "dense": training(copy.deepcopy(models["dense"]), x, y, dtype),
        "converted": training(models["converted"], x, y, dtype),
        "compacted": training(models["compacted"], x, y, dtype),
        "search": searching(copy.deepcopy(models["on_the_fly"]), x, y, dtype),
        "fly": training(models["on_the_fly"], x, y, dtype),
    }
    race, start = Round(steps, cpu, clock=CLOCKS[options.clock]), time.monotonic()
    while len(race.samples["fly"]) < FEWEST or time.monotonic() - start < options.seconds:
        race.run()
    timings = race.timings()
    found = (ratio(timings[a], timings[b]) for a, b in RATIOS)
    cells = [f"{value:.3f} ±{noise:.0%}" for value, noise in found]
    return " | ".join([f"{timings['dense'].ms:.1f}", *cells, str(len(race.samples["fly"]))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[197], choices=PIXELS)
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of rounds, for every row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(arguments)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, keep {options.keep:g}\n")
    names = ["model", "tokens", "batch", "dtype", "threads", "dense ms", *map(" / ".join, RATIOS), "rounds"]
    print("|".join(["", *(f" {name} " for name in names), ""]), "---".join("|" * (len(names) + 1)), sep="\n")
    cases = (options.models, options.tokens, options.batch, options.dtype, options.threads)
    for model, tokens, batch, dtype, threads in itertools.product(*cases):
        torch.set_num_threads(threads)
        row = measure(model, tokens, batch, getattr(torch, dtype), options)
        print(f"| {model} | {tokens} | {batch} | {dtype} | {threads} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

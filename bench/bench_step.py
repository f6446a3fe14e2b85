"""One training step (forward, backward, AdamW) five ways, side by side: time and peak memory.

    python bench/bench_step.py [--model deit_tiny_patch16_224] [--keep 0.25 0.5 0.75 1] [--batch 8]
                               [--dtype bfloat16] [--threads 2] [--clock cpu] [--ways dense on_the_fly]

Repeats are interleaved, so that a change of the machine's speed hits all ways alike, and medians are printed.
Before any clock starts, the outputs of the three pruned ways are compared. The wall clock is what counts; the
process clock (`--clock cpu`) is steadier on a machine that others use.

Memory is what torch's allocator hands out, traced by its profiler. `standing` is what the step starts with
and keeps: parameters and optimiser state, full-size in every way but the compacted one. `step` is the highest
point of one step above that: activations, casts, gradients.
"""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import uvc

WAYS = ("dense", "converted", "on_the_fly", "compacted", "masked")
# Relative errors that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Result(NamedTuple):
    """Median milliseconds of a step, MiB at its highest point, and MiB that stand before and after it."""

    ms: float
    step_mib: float
    standing_mib: float


def multiply_by_masks(model: nn.Module, structure: uvc.Structure) -> nn.Module:
    """The usual pruning research code: full products, then a multiplication by 0 or 1."""
    for block, kept in zip(model.blocks, structure.blocks, strict=True):
        heads, dims = block.attn.num_heads, block.attn.head_dim
        qk, v = torch.zeros(heads, dims), torch.zeros(heads, dims)
        for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
            qk[head, list(qk_dims)] = 1
            v[head, list(v_dims)] = 1
        neurons = torch.zeros(block.mlp.fc1.out_features)
        neurons[list(kept.neurons)] = 1
        rows = torch.cat([qk.flatten(), qk.flatten(), v.flatten()])
        block.attn.qkv.register_forward_hook(lambda _, args, out, mask=rows: out * mask)
        block.mlp.fc2.register_forward_pre_hook(lambda _, args, mask=neurons: (args[0] * mask,))
    return model


def models(name: str, keep: float, uniform: bool = False, **kwargs: object) -> dict[str, nn.Module]:
    """The five models from one set of random weights; `kwargs` go to `timm.create_model`.

    The structure is ragged and random, or, with `uniform`, the first heads and neurons of every block.
    """
    torch.manual_seed(0)
    dense = timm.create_model(name, **kwargs)
    converted = uvc.convert(copy.deepcopy(dense))
    if uniform:
        structure = uvc.Structure.uniform(converted, heads=keep, head_dims=1.0, neurons=keep)
    else:
        structure = uvc.Structure.random(converted, keep=keep, seed=0)
    fly = copy.deepcopy(converted)
    uvc.apply_structure(fly, structure)
    masked = multiply_by_masks(copy.deepcopy(dense), structure)
    return dict(zip(WAYS, (dense, converted, fly, uvc.compact(fly), masked), strict=True))


def training_step(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A closure that runs one whole step, under autocast unless `dtype` is float32."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def peak_mib(step: Callable[[], None]) -> float:
    """MiB that a repeat of `step` has allocated at its highest point, above what stood when it began.

    `step` frees the gradients of the step before first, so the trace begins below zero and is counted from
    its lowest point before the highest.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = lowest = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        lowest = min(lowest, level)
        highest = max(highest, level - lowest)
    return highest / 2**20


def standing_mib(model: nn.Module) -> float:
    """MiB of the parameters and of AdamW's two averages of each."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def run(
    name: str = "deit_tiny_patch16_224",
    keep: float = 0.5,
    batch: int = 8,
    repeats: int = 11,
    clock: Callable[[], float] = time.perf_counter,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = WAYS,
    **kwargs: object,
) -> dict[str, Result]:
    """What a step of each way costs; `kwargs` as in `models`. RuntimeError when the pruned ways disagree."""
    ways = models(name, keep, **kwargs)
    size = ways["dense"].patch_embed.img_size
    x, y = torch.randn(batch, 3, *size), torch.randint(ways["dense"].num_classes, (batch,))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = [ways[way].eval()(x).float() for way in ("on_the_fly", "compacted", "masked")]
    for out in outputs[1:]:
        error, allowed = ((out - outputs[0]).norm() / outputs[0].norm()).item(), TOLERANCE[dtype]
        if not error < allowed:
            raise RuntimeError(f"pruned models disagree: relative error {error:.1e}, allowed {allowed:.0e}")
    steps = {way: training_step(ways[way], x, y, dtype) for way in names}
    times: dict[str, list[float]] = {way: [] for way in names}
    for repeat in range(repeats + 1):
        for way, step in steps.items():
            start = clock()
            step()
            if repeat:  # the first round warms up
                times[way].append(clock() - start)
    return {
        way: Result(1e3 * statistics.median(times[way]), peak_mib(step), standing_mib(ways[way]))
        for way, step in steps.items()
    }


def main() -> None:
    """Print a table per kept fraction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--uniform", action="store_true", help="whole heads instead of random dims")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    dtype = getattr(torch, options.dtype)
    for keep in options.keep:
        names = list(dict.fromkeys(["dense", *options.ways]))
        how = {"clock": clock, "dtype": dtype, "names": names, "uniform": options.uniform}
        results = run(options.model, keep, options.batch, options.repeats, **how)
        dense, compacted = results["dense"], results.get("compacted")
        case = f"keep {keep}, batch {options.batch}, {options.dtype}, {options.threads} threads"
        print(f"\n{options.model}, {case}")
        print(f"{'way':12} {'ms':>8} {'x dense':>8} {'x compacted':>12}", end=" ")
        print(f"{'step MiB':>9} {'x dense':>8} {'with standing':>14} {'x dense':>8}")
        for way, (ms, step, standing) in results.items():
            print(f"{way:12} {ms:8.1f} {ms / dense.ms:8.3f}", end=" ")
            print(f"{ms / compacted.ms if compacted else float('nan'):12.3f}", end=" ")
            print(f"{step:9.1f} {step / dense.step_mib:8.3f} {step + standing:14.1f}", end=" ")
            print(f"{(step + standing) / (dense.step_mib + dense.standing_mib):8.3f}", flush=True)


if __name__ == "__main__":
    main()

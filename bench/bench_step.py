"""One training step (forward, backward, AdamW) five ways, side by side, on one thread.

    python bench/bench_step.py [--model deit_tiny_patch16_224] [--keep 0.5] [--batch 8] [--clock cpu]

Repeats are interleaved, so that a change of the machine's speed hits all five alike, and medians are printed.
Before any clock starts, the outputs of the three pruned ways are compared. The wall clock is what counts; the
process clock (`--clock cpu`) is steadier on a machine that others use.
"""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import uvc

WAYS = ("dense", "converted", "on_the_fly", "compacted", "masked")


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


def models(name: str, keep: float, **kwargs: object) -> dict[str, nn.Module]:
    """The five models from one set of random weights; `kwargs` go to `timm.create_model`."""
    torch.manual_seed(0)
    dense = timm.create_model(name, **kwargs)
    converted = uvc.convert(copy.deepcopy(dense))
    structure = uvc.Structure.random(converted, keep=keep, seed=0)
    fly = copy.deepcopy(converted)
    uvc.apply_structure(fly, structure)
    masked = multiply_by_masks(copy.deepcopy(dense), structure)
    return dict(zip(WAYS, (dense, converted, fly, uvc.compact(fly), masked), strict=True))


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A closure that runs one whole step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def run(
    name: str = "deit_tiny_patch16_224",
    keep: float = 0.5,
    batch: int = 8,
    repeats: int = 11,
    clock: Callable[[], float] = time.perf_counter,
    tolerance: float = 1e-4,
    **kwargs: object,
) -> dict[str, float]:
    """Median milliseconds per step of each way. RuntimeError when the pruned ways do not agree."""
    ways = models(name, keep, **kwargs)
    size = ways["dense"].patch_embed.img_size
    x, y = torch.randn(batch, 3, *size), torch.randint(ways["dense"].num_classes, (batch,))
    with torch.no_grad():
        outputs = [ways[way].eval()(x) for way in ("on_the_fly", "compacted", "masked")]
    for out in outputs[1:]:
        error = ((out - outputs[0]).norm() / outputs[0].norm()).item()
        if not error < tolerance:
            raise RuntimeError(f"pruned models disagree: relative error {error:.1e}, allowed {tolerance:.0e}")
    steps = {way: training_step(model, x, y) for way, model in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, step in steps.items():
            start = clock()
            step()
            if repeat:  # the first round warms up
                times[way].append(clock() - start)
    return {way: 1e3 * statistics.median(seconds) for way, seconds in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = run(options.model, options.keep, options.batch, options.repeats, clock)
    print(f"{'way':12} {'ms':>9} {'x dense':>8} {'x compacted':>12}")
    for way, ms in times.items():
        print(f"{way:12} {ms:9.1f} {ms / times['dense']:8.3f} {ms / times['compacted']:12.3f}")


if __name__ == "__main__":
    main()

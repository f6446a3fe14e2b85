"""What the solver costs beside the training step it serves: scores, prox, primal, dual, project.

    python bench/bench_solver.py [--model deit_tiny_patch16_224] [--batch 8] [--steps 20]

Solver time and whole time come from the same steps, so their ratio holds on a machine whose speed drifts.
"""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import copy
import time

import timm
import torch

import uvc
from uvc.config import DistillConfig, SolverConfig
from uvc.solver import Search
from uvc.task import Distillation


def run(
    name: str = "deit_tiny_patch16_224", batch: int = 8, steps: int = 20, **kwargs: object
) -> dict[str, float]:
    """Milliseconds per search step at budget 0.5 amid the annealing: whole step, solver, share."""
    torch.manual_seed(0)
    model = uvc.convert(timm.create_model(name, **kwargs))
    teacher = copy.deepcopy(model)
    size = model.patch_embed.img_size
    x, y = torch.randn(batch, 3, *size), torch.randint(model.num_classes, (batch,))
    search = Search(model, 0.5, "macs", steps=4 * steps, config=SolverConfig())
    search.count = steps  # past the start of the annealing: every part of the solver is at work
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    task = Distillation(teacher, DistillConfig())
    model.train()
    whole = solver = 0.0
    for i in range(steps + 2):
        t = [time.perf_counter()]
        search.before()
        t.append(time.perf_counter())
        task(model, x, y)["loss"].backward()
        t.append(time.perf_counter())
        search.observe()
        t.append(time.perf_counter())
        optimizer.step()
        t.append(time.perf_counter())
        search.step(optimizer)
        t.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        if i >= 2:  # the first two warm up
            whole += time.perf_counter() - t[0]
            solver += (t[1] - t[0]) + (t[3] - t[2]) + (t[5] - t[4])
    return {"step_ms": 1e3 * whole / steps, "solver_ms": 1e3 * solver / steps, "share": solver / whole}


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    row = run(options.model, options.batch, options.steps)
    print(f"step {row['step_ms']:.1f} ms, solver {row['solver_ms']:.2f} ms, share {row['share']:.2%}")


if __name__ == "__main__":
    main()

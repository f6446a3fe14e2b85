"""Whole models: inference and training steps, skipping against everything else one could do."""

import gc

import pytest

from uvc.bench.models import BESIDE, models
from uvc.bench.rows import Group
from uvc.bench.steps import peak_mib
from uvc.bench.variants import VARIANTS

TINY, SMALL, BASE = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
PHASES = ("training", "inference")
# Every peer stands beside keep 0.5; at other fractions only what depends on them, and dense.
FEW = ("dense", "on_the_fly", "compacted", "masked")
KEPT = [(TINY, 0.5), (TINY, 1.0), (TINY, 0.75), (TINY, 0.25), (SMALL, 0.5), (BASE, 0.5)]
CASES = [(phase, *kept) for phase in PHASES for kept in KEPT]
# Last, as a run that ends early has what comes first.
MORE_ON_GPU = [(p, model, keep) for p in PHASES for model in (SMALL, BASE) for keep in (0.75, 0.25)]
BATCH = {"cpu": {TINY: 8, SMALL: 2, BASE: 1}, "cuda": {TINY: 256, SMALL: 256, BASE: 128}}


@pytest.mark.parametrize(("phase", "model", "keep"), [*CASES, *MORE_ON_GPU])
def test_model(benchmark, session, phase, model, keep):
    if (phase, model, keep) in MORE_ON_GPU and not session.on_gpu:
        pytest.skip(
            "no GPU (--device cuda): larger models at every fraction would pass eight minutes on a CPU"
        )
    if session.quick and (model, keep) != (TINY, 0.5):
        pytest.skip("--quick measures DeiT-T at keep 0.5 only")
    batch = BATCH[session.device.type][model]
    variants = list(VARIANTS if keep == 0.5 else FEW)
    if model == BASE and not session.on_gpu:
        variants = list(FEW[:3])  # more, each with its optimiser, would not fit beside one another into 16 GB
    if keep == 1.0:
        variants = ["dense", "converted", "on_the_fly"]
    if "compiled" in variants and (session.options.no_compile or (model != TINY and not session.on_gpu)):
        variants.remove("compiled")
    gc.collect()  # models of the group before may hang in reference cycles, gigabytes of them
    made = models(
        model,
        phase,
        keep,
        batch,
        session.device,
        session.dtype,
        variants,
        BESIDE if model == TINY and keep == 0.5 else (),
    )
    for variant, reason in made.left:
        session.leave_out(variant, reason)
    timings = session.time(benchmark, made.steps, rounds=9 if session.on_gpu else 6 if model == TINY else 4)
    peaks = {variant: peak_mib(step, session.device) for variant, step in made.steps.items()}
    session.add(
        benchmark,
        Group(
            suite="models",
            model=model,
            what=phase,
            dtype=session.dtype,
            batch=batch,
            keep=keep,
            device=session.device,
            timings=timings,
            works=made.works,
            backends=made.backends,
            peaks=peaks,
            standing=made.standing,
            error=made.error,
        ),
    )

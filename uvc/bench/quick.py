"""`uvc bench`: how fast a training step is at some kept fractions; or whether it got slower."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uvc import environment
from uvc.app.resolve import known_model
from uvc.bench import ceilings, regression, rows, table
from uvc.bench.figure import speedup_figure
from uvc.bench.models import models
from uvc.bench.rows import Group, Row
from uvc.bench.steps import peak_mib
from uvc.bench.timing import Round
from uvc.environment import choose_device

MODEL = "deit_tiny_patch16_224"
KEEPS = (0.75, 0.5, 0.25)
ROUNDS = 11
VARIANTS = ("dense", "on_the_fly", "compacted")
BESIDE = ("solver", "solver_removing")
DTYPES = ("float32", "bfloat16", "float16")
OUT = Path("runs/bench")
Say = Callable[[str], None]


def bench(options: Mapping[str, Any], say: Say) -> int:
    """Runs `uvc bench` with its options by name (None: the default) and returns the exit code.

    0; 1 when something is slower than in `against` or at `against_ref` by more than the noise band.
    ValueError for options that make no sense.
    """
    setting = _setting(options)
    if options["against_ref"] is not None:
        found = regression.against_ref(options["against_ref"], say=say, **setting)
        return _verdict(found, say)
    saved = None if options["against"] is None else rows.read(options["against"])
    measured = measure(**setting, say=say)
    found = [] if saved is None else regression.compare(measured, saved, options["against"])
    for line in table.lines(measured):
        say(line)
    out = options["out"] or OUT
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "bench.png"
    speedup_figure(measured).savefig(picture, dpi=150)
    for path in rows.append(out, measured):
        say(f"rows:    {path}")
    say(f"picture: {picture}")
    return _verdict(found, say)


def _setting(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["against"] is not None and options["against_ref"] is not None:
        raise ValueError("--against and --against-ref exclude each other; give one")
    device = choose_device(options["device"], options["threads"])
    model = known_model(options["model"] or MODEL)
    dtype = options["dtype"] or ("bfloat16" if device.type == "cuda" else "float32")
    if device.type == "cpu" and dtype == "float16":
        raise ValueError("--dtype: float16 is for GPUs; use float32 or bfloat16")
    batch = options["batch_size"] or (256 if device.type == "cuda" else 8)
    keeps = KEEPS if options["keep"] is None else _keeps(options["keep"])
    return {
        "model": model,
        "device": device,
        "dtype": getattr(torch, dtype),
        "batch": batch,
        "keeps": keeps,
        "rounds": options["rounds"] or ROUNDS,
    }


def _keeps(text: str) -> tuple[float, ...]:
    try:
        keeps = tuple(float(part) for part in text.split(","))
    except ValueError:
        keeps = ()
    if not keeps or not all(0 < keep <= 1 for keep in keeps):
        raise ValueError(f"--keep: {text!r}; give kept fractions above 0 and at most 1, as in 0.75,0.5,0.25")
    return keeps


def measure(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    keeps: Sequence[float],
    rounds: int,
    say: Say,
) -> list[Row]:
    """The rows of a training step, one group per kept fraction, and first of all nothing pruned."""
    say(f"{model}, batch {batch}, on {environment.device_name(device)}: training steps, interleaved")
    highest = ceilings.measure(device, dtype)
    groups = []
    for keep in (1.0, *(keep for keep in keeps if keep < 1)):
        variants = ("dense", "converted") if keep == 1 else VARIANTS
        made = models(model, "training", keep, batch, device, dtype, variants, BESIDE)
        for variant, reason in made.left:
            if device.type == "cuda" or variant not in ("triton", "cuda", "cuda-host"):
                say(f"left out: {variant}: {reason}")
        times = Round(made.steps, device)
        for _ in range(rounds):
            times.run()
        peaks = {variant: peak_mib(step, device) for variant, step in made.steps.items()}
        highest = highest.raised(ceilings.measure(device, dtype, brief=True))
        groups.append(
            Group(
                suite="quick",
                model=model,
                what="training",
                dtype=dtype,
                batch=batch,
                keep=keep,
                device=device,
                timings=times.timings(),
                works=made.works,
                backends=made.backends,
                peaks=peaks,
                standing=made.standing,
                error=made.error,
            )
        )
    return [row for group in groups for row in rows.make_rows(group, highest)]


def _verdict(found: Sequence[regression.Comparison], say: Say) -> int:
    for comparison in found:
        say(str(comparison))
    slower = sum(comparison.slower for comparison in found)
    if found:
        say(f"{slower} of {len(found)} slower than the noise band allows" if slower else "no regression")
    return 1 if slower else 0

"""Training steps as fractions of one another on this processor: many sizes, one table.

    fly / dense, fly / compacted    skipped on the fly, by the dense and by the compacted model's step
    search / compacted              the same with the solver beside it
    converted / dense               nothing pruned

All are timed in turn in one process, as bench/README.md says; below 1 the first is faster. Rows are kept in
bench/results/<device>/ratios.csv, of which --docs writes the table of docs/bench.md.

python bench/ratios.py [--models deit_tiny_patch16_224 ...] [--tokens 197 ...] [--batch 8 ...] [--threads 1 2]
                       [--dtype float32 bfloat16] [--keep 0.5] [--seconds 30] [--clock wall] [--docs]
"""

import argparse
import copy
import csv
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from uvc_kernels import _dispatch

from uvc.bench.kept import keep, put
from uvc.bench.steps import images_and_labels, searching, training
from uvc.bench.timing import Round, ratio
from uvc.bench.variants import build
from uvc.environment import commit, device_name, slug, versions_line

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "bench.md"
MARKS = ("<!-- ratios -->\n", "<!-- /ratios -->")

PIXELS = {17: 64, 37: 96, 65: 128, 197: 224, 577: 384}  # patches of 16 pixels and a class token
RATIOS = (("fly", "dense"), ("fly", "compacted"), ("search", "compacted"), ("converted", "dense"))
NAMES = [" / ".join(pair) for pair in RATIOS]
CASE = ("model", "tokens", "batch", "dtype", "threads", "keep")
ABOUT = ("date", "commit", "device", "versions", "products")
FEWEST = 5  # rounds
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}  # the second on a busy machine


def measure(
    model: str, tokens: int, batch: int, dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, object]:
    """The figures of a row: milliseconds of the dense step, the ratios with their noise, rounds."""
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
    found: dict[str, object] = {"dense_ms": round(timings["dense"].ms, 1)}
    for name, (a, b) in zip(NAMES, RATIOS, strict=True):
        value, noise = ratio(timings[a], timings[b])
        found |= {name: round(value, 4), f"{name} ±": round(noise, 4)}
    return found | {"rounds": len(race.samples["fly"])}


def results() -> Path:
    """The CSV of this device."""
    return ROOT / "results" / slug(device_name(torch.device("cpu"))) / "ratios.csv"


def read(path: Path) -> list[dict[str, str]]:
    """The latest row of each case, in order of cases."""
    with path.open(newline="") as file:
        latest = {tuple(r[name] for name in CASE): r for r in csv.DictReader(file)}

    def place(r: Mapping[str, str]) -> tuple[object, ...]:
        sizes = {"tiny": 0, "small": 1, "base": 2}
        size = next((n for name, n in sizes.items() if name in r["model"]), len(sizes))
        return size, r["model"], r["dtype"] != "float32", *(int(r[n]) for n in ("tokens", "batch", "threads"))

    return sorted(latest.values(), key=place)


def line(r: Mapping[str, object]) -> str:
    """A row of the table."""
    case = (str(r[name]) for name in CASE[:-1])
    cells = (f"{float(str(r[name])):.3f} ±{float(str(r[f'{name} ±'])):.0%}" for name in NAMES)
    return f"| {' | '.join((*case, str(r['dense_ms']), *cells, str(r['rounds'])))} |"


def head() -> list[str]:
    """The first lines of the table."""
    names = [*CASE[:-1], "dense ms", *NAMES, "rounds"]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def write_docs(page: Path = PAGE, found: Path | None = None) -> None:
    """Put the table between its marks."""
    rows = read(found or results())
    newest = max(rows, key=lambda r: r["date"])
    about = ", ".join(newest[name] for name in ("device", "versions", "date"))
    about += f"; products of float32: {newest['products']}; keep {newest['keep']}:"
    put(page, MARKS, "\n".join([about, "", *head(), *map(line, rows), ""]))


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
    parser.add_argument("--to", type=Path, default=None, help="the CSV; that of this device")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/bench.md, time nothing")
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs()
        return 0
    print(*head(), sep="\n", flush=True)
    cases = (options.models, options.tokens, options.batch, options.dtype, options.threads)
    for model, tokens, batch, dtype, threads in itertools.product(*cases):
        torch.set_num_threads(threads)
        figures = measure(model, tokens, batch, getattr(torch, dtype), options)
        products = "our own" if _dispatch.own_products() else "the vendor's"
        device = device_name(torch.device("cpu"))
        about = (time.strftime("%Y-%m-%d"), commit() or "", device, versions_line(), products)
        case = (model, tokens, batch, dtype, threads, options.keep)
        row = dict(zip((*ABOUT, *CASE), (*about, *case), strict=True)) | figures
        keep(row, options.to or results())
        print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Latency of compacted models over the dense model's, in the same runtime: one row a case, kept as CSV.

At a share of the MACs: `ragged`, a random structure, whose heads differ in size, and `even`, the first
dims of every head. Torch runs `uvc.compact(model, "auto")`, other runtimes what `uvc export` writes; with
--form grouped torch runs what `compress` saves. In each turn both models run twice, and the second pass is
timed, so that a model finds its weights where its own last pass left them. The ratio is the median over
turns.

python bench/runtimes.py [--models deit_tiny_patch16_224 ...] [--structures ragged even] [--batch 1 8]
                         [--threads 1 2] [--runtimes eager compiled onnxruntime openvino] [--seconds 5]
                         [--shares 0.5] [--form grouped]
python bench/runtimes.py --docs   # the tables of docs/export.md from the latest rows
"""

import argparse
import copy
import csv
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import timm
import torch
from torch import Tensor, nn

import uvc
import uvc.models
from uvc.bench.kept import keep, put
from uvc.environment import commit, device_name, slug, versions_line
from uvc.io.export import suited
from uvc.io.runtimes import read_onnx, read_openvino, write_onnx

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "export.md"
MARKS = ("<!-- runtimes -->\n", "<!-- /runtimes -->"), ("<!-- shares -->\n", "<!-- /shares -->")
SHARE = 0.5  # of the MACs of `MODELS`, in the first table; the second is of all others
# Of what torch runs; for the others it is chosen as `uvc export` does.
FORMS = {"eager": "auto", "compiled": "auto", "onnxruntime": "export", "openvino": "export"}
RUNTIMES = tuple(FORMS)
TORCH = ("eager", "compiled")
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
FIELDS = (
    "date", "commit", "device", "versions", "model", "structure", "share", "form", "macs", "batch", "threads",
    "runtime", "dense_ms", "ms", "ratio", "low", "high", "turns",
)  # fmt: skip
FEWEST, MOST = 5, 60  # turns
REST = 0.05  # seconds in which the threads of the other session, which spin, fall asleep
Run = Callable[[], object]


def structure(model: nn.Module, kind: str, asked: float = SHARE) -> uvc.Structure:
    """The structure of this kind whose MACs come nearest to this share from below."""
    low, high, whole = 0.0, 1.0, uvc.cost(model).macs
    for _ in range(12):
        keep = (low + high) / 2
        found = make(model, kind, keep)
        share = uvc.costs.cost(model, found).macs / whole
        low, high = (keep, high) if share <= asked else (low, keep)
    return make(model, kind, low)


def make(model: nn.Module, kind: str, keep: float) -> uvc.Structure:
    """A structure that keeps this fraction of dims and neurons."""
    if kind == "ragged":
        return uvc.Structure.random(model, keep, seed=0)
    return uvc.Structure.uniform(model, head_dims=keep, neurons=keep)


def loaded(model: nn.Module, runtime: str, images: Tensor, folder: Path) -> Run:
    """What runs the model on these images in a runtime, with torch's number of threads, once warm."""
    if runtime in TORCH:
        program = torch.compile(model, dynamic=False) if runtime == "compiled" else model
    else:
        path = folder / f"{id(model)}.onnx"
        if not path.exists():
            write_onnx(model, torch.randn(2, *images.shape[1:]), path)
        program = (read_onnx if runtime == "onnxruntime" else read_openvino)(path)

    def run() -> object:
        with torch.no_grad():
            return program(images)

    run()
    return run


def turns(dense: Run, small: Run, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of the second of two passes of each, by turns: with one thread of the process's own clock,
    as the wall's counts the other work of a busy machine, too.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    start = time.monotonic()
    while len(times[0]) < FEWEST or (len(times[0]) < MOST and time.monotonic() - start < seconds):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            run = (dense, small)[which]
            if torch.get_num_threads() > 1:
                time.sleep(REST)
            run()
            begun = clock()
            run()
            times[which].append(1e3 * (clock() - begun))
    return times


def row(what: Mapping[str, object], dense: Sequence[float], small: Sequence[float]) -> dict[str, object]:
    """A row of the CSV, with the quartiles of the ratio."""
    ratios = sorted(a / b for a, b in zip(small, dense, strict=True))
    low, _, high = quantiles(ratios, n=4)
    ms = {"dense_ms": median(dense), "ms": median(small), "ratio": median(ratios), "low": low, "high": high}
    about = (time.strftime("%Y-%m-%d"), commit() or "", device_name(torch.device("cpu")), versions_line())
    figures = {name: round(value, 4) for name, value in ms.items()}
    return dict(zip(FIELDS, about, strict=False)) | dict(what) | figures | {"turns": len(ratios)}


def results() -> Path:
    """The CSV of this device."""
    return ROOT / "results" / slug(device_name(torch.device("cpu"))) / "runtimes.csv"


def read(path: Path) -> list[dict[str, str]]:
    """The latest row of each case, in order of cases."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("model", "structure", "share", "batch", "threads")
    latest = {(*(r[name] for name in key), column(r)): r for r in rows}
    names = {name: i for i, name in enumerate((*MODELS, *RUNTIMES, "ragged", "even"))}

    def place(r: Mapping[str, str]) -> tuple[float, ...]:
        words = (names.get(r[name], len(names)) for name in ("model", "structure", "runtime"))
        return *words, float(r["share"]), int(r["batch"]), int(r["threads"])

    return sorted(latest.values(), key=place)


def column(r: Mapping[str, str]) -> str:
    """Where a row stands in a table: its runtime, with what `compress` saves where torch runs that."""
    return f"{r['runtime']}, grouped" if r["runtime"] in TORCH and r["form"] == "grouped" else r["runtime"]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The latest rows as Markdown: a line for each model, structure, share, batch and threads."""
    lines: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for r in rows:
        key = tuple(r[name] for name in ("model", "structure", "share", "batch", "threads"))
        lines.setdefault(key, {})[column(r)] = r
    newest = max(rows, key=lambda r: r["date"])
    about = ", ".join(newest[name] for name in ("device", "versions", "date"))
    names = [label for name in RUNTIMES for label in (name, f"{name}, grouped")]
    runtimes = [name for name in names if any(name in found for found in lines.values())]
    heads = " | ".join(f"{name}, dense ms | ratio" for name in runtimes)
    text = [
        f"{about}; milliseconds of the dense model, the compacted model's time over them:",
        "",
        f"| model | structure | of the MACs | batch | threads | {heads} |",
        "|---" * (5 + 2 * len(runtimes)) + "|",
    ]
    for key, found in lines.items():
        known = [found.get(name) for name in runtimes]
        cells = [f"{float(r['dense_ms']):.1f} | **{float(r['ratio']):.3f}**" if r else " | " for r in known]
        text.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(text) + "\n"


def write_docs(page: Path = PAGE, found: Path | None = None) -> None:
    """Put the tables between their marks."""
    rows = read(found or results())
    for marks, half in zip(MARKS, (True, False), strict=True):
        chosen = [r for r in rows if (float(r["share"]) == SHARE and r["model"] in MODELS) is half]
        if chosen:
            put(page, marks, table(chosen))


def cases(options: argparse.Namespace, folder: Path) -> "Sequence[tuple[dict[str, object], Run, Run]]":
    """What is timed, with both models ready to run."""
    for name, kind, share in itertools.product(options.models, options.structures, options.shares):
        torch.manual_seed(0)
        dense = timm.create_model(name).eval()
        kept = structure(dense, kind, share)
        pruned = uvc.apply_structure(copy.deepcopy(dense), kept)
        macs = uvc.cost(pruned).macs / uvc.cost(dense).macs
        small = {form: uvc.compact(pruned, form).eval() for form in ("auto", "grouped")}
        small["export"] = suited(small["grouped"], "onnx")
        for threads, batch, runtime in itertools.product(options.threads, options.batch, options.runtimes):
            torch.set_num_threads(threads)
            images = torch.randn(batch, *dense.default_cfg["input_size"])
            torch._dynamo.reset()  # after so many models of one class it would run them as they are
            what = dict(
                model=name,
                structure=kind,
                share=share,
                form=options.form if options.form and runtime in TORCH else FORMS[runtime],
                macs=round(macs, 4),
                batch=batch,
                threads=threads,
                runtime=runtime,
            )
            pair = dense, small[what["form"]]
            yield what, *(loaded(model, runtime, images, folder) for model in pair)


def main(arguments: Sequence[str] | None = None) -> int:
    """Times the cases, prints and keeps a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--structures", nargs="+", default=["ragged", "even"], choices=["ragged", "even"])
    parser.add_argument("--shares", nargs="+", type=float, default=[SHARE], help="of the MACs")
    parser.add_argument("--form", choices=["auto", "grouped"], default=None)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES, choices=RUNTIMES)
    parser.add_argument("--seconds", type=float, default=5.0, help="of turns, for every row")
    parser.add_argument("--to", type=Path, default=None, help="the CSV; that of this device")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/export.md, time nothing")
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for what, dense, small in cases(options, Path(folder)):
            found = row(what, *turns(dense, small, options.seconds))
            keep(found, options.to or results())
            print(*(f"{found[name]}" for name in FIELDS[4:]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

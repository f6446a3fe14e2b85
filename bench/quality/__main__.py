"""`python -m bench.quality` runs what is missing in results.csv; `report` prints it; `page` writes
docs/quality.md; `accept` checks the tasks; `elastic` runs several budgets in one model.

Run from the repository root.
"""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
from pathlib import Path

from bench.quality import elastic, harness, page, report
from bench.quality.arms import ARMS, MAIN
from bench.quality.context import accept, write_acceptance
from bench.quality.tasks import TASKS
from uvc.io.files import make_folder

DOCS = Path(__file__).parents[2] / "docs"


# What each command takes beside --results; what is not given has the default beside it.
TAKES = {
    "run": ("arms", "budgets", "seeds", "tasks", "mode", "minutes", "workers"),
    "report": ("mode",),
    "page": (),
    "accept": ("seeds", "tasks"),
    "elastic": ("seeds", "tasks", "minutes"),
}
DEFAULTS = {
    "arms": list(MAIN),
    "budgets": [0.5, 0.33, 0.15, 0.08],
    "seeds": list(range(8)),
    "tasks": list(TASKS),
    "mode": "epochs",
    "minutes": 300.0,
    "workers": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("command", nargs="?", choices=list(TAKES), default="run")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], metavar="ARM")
    parser.add_argument("--budgets", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--mode", choices=["epochs", "compute"], help="what all arms have in common")
    parser.add_argument("--minutes", type=float, help="no row begins after this")
    parser.add_argument("--workers", type=int, help="processes of one thread each")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="other files lie beside it")
    options = parser.parse_args()
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif name not in TAKES[options.command]:
            parser.error(f"{options.command} takes no --{name}")
    if options.command in ("run", "elastic", "accept"):
        make_folder(options.results.parent, "--results")  # before hours of training, not after them
    if options.command == "accept":
        rows = [accept(TASKS[name], seed) for name in options.tasks for seed in options.seeds]
        write_acceptance(rows, options.results.with_name("tasks.json"))
        for row in rows:
            print(row)
    elif options.command == "report":
        print(report.render(harness.read(options.results), options.mode))
    elif options.command == "elastic":
        beside = options.results.with_name(elastic.RESULTS.name)
        elastic.run(options.tasks, options.seeds, options.minutes, beside)
    elif options.command == "page":
        page.write(harness.read(options.results), options.results, DOCS)
    else:
        arms = list(ARMS) if "all" in options.arms else options.arms
        wanted = harness.jobs(arms, options.budgets, options.seeds, options.tasks, options.mode)
        left = harness.run(wanted, options.minutes, options.workers, options.results)
        print(f"{len(wanted) - left} of {len(wanted)} rows are done")


if __name__ == "__main__":
    main()

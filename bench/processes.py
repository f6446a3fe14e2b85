"""Whether several processes reach the accuracy of one: the whole digits recipe by seed, all from one teacher.

Processes of a run have a CPU thread each, and share its batches. Runs that have ended are not run again.

python bench/processes.py OUT [--seeds 0 1 2] [--processes 2] [--teacher DIR]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no")


def run(out: Path, seed: int, processes: int, teacher: Path | None) -> dict:
    """The summary of one run; without a teacher it trains one."""
    if not (out / "summary.json").exists():
        launch = (*LAUNCH, "--num_processes", str(processes)) if processes > 1 else ()
        options = ["--data", "digits", "--budget", "0.5", "--seed", str(seed), "--threads", "1"]
        options += ["--teacher", str(teacher)] if teacher else []
        command = [sys.executable, *launch, "-m", "uvc", "compress", "--device", "cpu", *options]
        command += ["--quiet", "--resume", "auto", "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "summary.json").read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row for each seed: top-1 of 500 images after the search and at the end, of one and several."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--teacher", type=Path, help="Its folder; else the run of the first seed trains one.")
    options = parser.parse_args(arguments)
    teacher, many = options.teacher, options.processes
    if teacher is None:
        run(options.out / "first", options.seeds[0], 1, None)
        teacher = options.out / "first" / "teacher"
    print(f"| seed | teacher | after the search: 1, {many} | at the end: 1, {many} |\n|---|---|---|---|")
    for seed in options.seeds:
        one, other = (run(options.out / f"{seed}-{n}", seed, n, teacher) for n in (1, many))
        searched, final = ([f"{s[k]:.1f}" for s in (one, other)] for k in ("before_post_top1", "final_top1"))
        print(
            f"| {seed} | {one['teacher_top1']:.1f} | {', '.join(searched)} | {', '.join(final)} |", flush=True
        )


if __name__ == "__main__":
    main()

"""`make bench-gpu`: everything worth knowing about a GPU machine without a network, in one call.

    python bench/gpu.py [--out bench/results/gpu-NAME] [--rest] [--dry-run] [--only STAGE ...]

Stages of one wave run at once, waves one after another, each stage with a limit, all within nine minutes;
what is timed has the machine to itself. What does not fit is a second call, --rest. A stage that fails is
named and the others go on; the exit code is 1 then. What came out lies in one folder: stages.csv, log.txt
with all that was printed, the CSV files of the benchmarks and of the profiler.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
LIMIT_S = 9 * 60
GRACE_S = 12  # between asking a stage to stop and ending it: benchmarks write what they have
running: list[subprocess.Popen] = []  # stages, each in a session of its own
stopping = threading.Event()  # no other is started
UVC = (PYTHON, "-c", "from uvc.cli import main; main()")


class Stage(NamedTuple):
    """A command, its limit in seconds, what must be here for it; `wrong`: what its output must not contain.

    `optional`: it is left out without blame where something is missing. `wave`: when it runs; stages of one
    wave run at once. `rest`: it belongs to the second call.
    """

    name: str
    limit_s: int
    needs: tuple[str, ...]
    command: tuple[str, ...]
    wrong: str = ""
    optional: bool = False
    wave: int = 0
    rest: bool = False


def stages(out: Path, scratch: Path) -> list[Stage]:
    """All stages, in the order in which they matter."""
    here = Path(__file__).parent
    on_gpu = str(here / "on_gpu.py")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    measure = (*pytest, "--device", "cuda", "--results", str(out), "--benchmark-disable-gc")
    search = ("--teacher-epochs", "2", "--warmup-epochs", "0", "--search-epochs", "10", "--post-epochs", "1")
    many = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    # Each access costs a hundred times its time there, so only what is written by hand, in one dtype.
    check = (PYTHON, on_gpu, "check", "cuda", "bfloat16")
    return [
        Stage("machine", 20, (), (PYTHON, on_gpu, "machine")),
        Stage("build", 90, ("torch", "c++"), (PYTHON, "setup.py", "build_ext", "--inplace")),
        Stage("self-check", 80, ("gpu", "torch"), (*UVC, "doctor"), "FAILED|WRONG", wave=1),
        Stage("peers", 40, ("gpu", "torch"), (PYTHON, str(here / "peers.py"), "--out", str(out)), wave=2),
        Stage(
            "models", 240, ("gpu", "torch", "pytest_benchmark"), (*measure, "bench/test_models.py"), wave=3
        ),
        Stage(
            "search",
            75,
            ("gpu", "torch", "sklearn"),
            (*UVC, "compress", "--data", "digits", "--device", "cuda", "--budget", "0.5", "--quiet", *search,
             "--out", str(scratch / "digits")),
            "not captured",
            wave=4,
        ),
        Stage(
            "compiled search",
            240,
            ("gpu", "torch", "sklearn", "triton"),
            (*UVC, "compress", "--data", "digits", "--device", "cuda", "--budget", "0.5", "--quiet", *search,
             "--compile", "--out", str(scratch / "compiled")),
            "not captured",
            wave=7,
            rest=True,
        ),
        Stage(
            "layers",
            110,
            ("gpu", "torch", "pytest_benchmark"),
            (*measure, "--no-compile", "--benchmark-columns", "median", "bench/test_kernels.py"),
            wave=5,
            rest=True,
        ),
        Stage(
            "profile",
            60,
            ("gpu", "torch", "ncu"),
            ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--section", "SpeedOfLight",
             "--section", "LaunchStats", "--section", "Occupancy", "--csv", "--page", "details", "--log-file",
             str(out / "ncu.csv"), PYTHON, on_gpu, "profile"),
            optional=True,
            wave=6,
            rest=True,
        ),
        Stage(
            "tests",
            240,
            ("gpu", "torch", "pytest"),
            (*pytest, "tests/kernels", *many),
            wave=7,
            rest=True,
        ),
        Stage(
            "memcheck",
            240,
            ("gpu", "torch", "compute-sanitizer"),
            (*sanitizer, "memcheck", *check),
            optional=True,
            wave=7,
            rest=True,
        ),
        Stage(
            "racecheck",
            240,
            ("gpu", "torch", "compute-sanitizer"),
            (*sanitizer, "racecheck", *check),
            optional=True,
            wave=7,
            rest=True,
        ),
    ]  # fmt: skip


def missing(need: str) -> str | None:
    """Why `need` is not here, or None."""
    if need == "gpu":
        if shutil.which("nvidia-smi") is None:
            return "no NVIDIA GPU: nvidia-smi is not on the PATH"
        return None if gpu("name") else "no NVIDIA GPU: nvidia-smi names none"
    if need == "c++":
        found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        return None if found else "no C++ compiler on the PATH"
    if need in ("ncu", "compute-sanitizer"):
        return None if shutil.which(need) else f"{need} is not on the PATH"
    return None if importlib.util.find_spec(need) else f"the Python package {need} is not installed"


def gpu(field: str) -> str:
    """One property of the first GPU; empty where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.strip().splitlines()), "") if done.returncode == 0 else ""


def environment(packages: Path) -> dict[str, str]:
    """The variables of every stage: this source tree first, no network, no spinning threads."""
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
    }
    if (capability := gpu("compute_cap")) and "TORCH_CUDA_ARCH_LIST" not in variables:
        # Hopper's own instructions need the a.
        variables["TORCH_CUDA_ARCH_LIST"] = "9.0a" if capability == "9.0" else capability
    return variables


def link_packages(folder: Path) -> Path:
    """`folder` with both packages under the names they are imported by."""
    folder.mkdir(parents=True)
    (folder / "uvc").symlink_to(ROOT / "uvc")
    (folder / "uvc_kernels").symlink_to(ROOT / "kernels")
    return folder


def run(
    stage: Stage, limit_s: float, variables: dict[str, str], log: TextIO, gate: threading.Lock
) -> tuple[str, list[str]]:
    """What happened ("ok", or why not), and what was printed, which `log` gets when the stage has ended."""
    if stage.name.startswith(("memcheck", "racecheck")):
        # Neighbours in one cached block would hide an access beyond a tensor.
        variables = variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+") as printed:
        with gate:  # a process that is started is known to whoever ends all
            if stopping.is_set():
                return "stopped", []
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running.append(process)
        try:
            code, status = process.wait(limit_s), ""
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit_s:.0f} s"
            code = end(process)
        printed.seek(0)
        lines = printed.read().splitlines()
    with gate:
        running.remove(process)
        print(f"\n===== {stage.name}: {' '.join(stage.command)}", *lines, sep="\n", file=log, flush=True)
    if not status and code:
        status = f"exit code {code}: {next((line for line in reversed(lines) if line.strip()), 'no output')}"
    if not status and stage.wrong and (found := re.search(f".*({stage.wrong}).*", "\n".join(lines))):
        status = found[0].strip()
    return status[:300] or "ok", lines


def end(process: subprocess.Popen) -> int:
    """Ask a stage and its children to stop, then make them."""
    for sign, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            return process.wait(wait_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    return process.poll() or 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 when one failed or there is no GPU to measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--rest", action="store_true", help="run what does not fit into nine minutes")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and what is missing")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages")
    options = parser.parse_args(arguments)
    name = "-".join(re.findall("[a-z0-9]+", gpu("name").lower())) or "none"
    out = (options.out or ROOT / "bench" / "results" / f"gpu-{name}").resolve()
    known = [stage.name for stage in stages(out, out)]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only: {', '.join(sorted(unknown))}: no such stage; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        chosen = [
            s
            for s in stages(out, scratch)
            if (s.name in options.only if options.only else s.rest == options.rest)
        ]
        if options.dry_run:
            return dry_run(chosen)
        out.mkdir(parents=True, exist_ok=True)
        variables = environment(link_packages(scratch / "packages"))
        return run_all(chosen, out, variables)


def dry_run(chosen: Sequence[Stage]) -> int:
    """One line per stage."""
    lacking = 0
    for stage in chosen:
        why = [reason for need in stage.needs if (reason := missing(need))]
        lacking += bool(why) and not stage.optional
        print(
            f"{stage.name:16} "
            + ("missing: " + "; ".join(why) if why else f"would run, up to {stage.limit_s} s")
        )
    return 1 if lacking else 0


def run_all(chosen: Sequence[Stage], out: Path, variables: dict[str, str]) -> int:
    """Run wave by wave; the tables of the benchmarks are printed last."""
    began, failed, tables, gate = time.monotonic(), [], {}, threading.Lock()
    with (out / "log.txt").open("w") as log, (out / "stages.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", "seconds", "result"])

        def one(stage: Stage) -> None:
            start = time.monotonic()
            left_s = LIMIT_S - (start - began) - GRACE_S
            why = [reason for need in stage.needs if (reason := missing(need))]
            lines: list[str] = []
            if why:
                status = "left out: " + "; ".join(why)
            elif left_s < 5:
                status = f"left out: the {LIMIT_S} s of all stages are over"
            else:
                status, lines = run(stage, min(stage.limit_s, left_s), variables, log, gate)
            seconds = time.monotonic() - start
            with gate:
                if status != "ok" and not (why and stage.optional):
                    failed.append(stage.name)
                writer.writerow([stage.name, f"{seconds:.1f}", status])
                file.flush()
                print(f"{stage.name:16} {seconds:6.1f} s  {status}", flush=True)
                tables[stage.name] = lines if stage.name == "peers" else last_table(lines)

        stopping.clear()
        try:
            for _, wave in itertools.groupby(chosen, lambda stage: stage.wave):
                wave = list(wave)
                with ThreadPoolExecutor(len(wave)) as pool:
                    try:
                        list(pool.map(one, wave))
                    except BaseException:
                        end_all(gate)
                        raise
        finally:
            end_all(gate)
    print("\n".join(line for name in ("peers", "models", "layers") for line in tables.get(name, ())))
    print(f"results: {out}")
    failed = [stage.name for stage in chosen if stage.name in failed]
    print(f"FAILED: {', '.join(failed)}" if failed else "every stage passed")
    return 1 if failed else 0


def end_all(gate: threading.Lock) -> None:
    """Ends what runs: a stage has a session of its own and would go on."""
    with gate:
        stopping.set()
        started = list(running)
    for process in started:
        end(process)


def last_table(lines: list[str]) -> list[str]:
    """What a benchmark printed after the word on its ceilings."""
    starts = [i for i, line in enumerate(lines) if line.startswith("ceilings of ")]
    return lines[starts[-1] :] if starts else []


if __name__ == "__main__":
    # Also where SIGINT came in ignored, as in a shell's background: stages are asked to stop by it.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what came out until now is in the folder of results")

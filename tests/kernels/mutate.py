"""`make mutate`: deletes each barrier, wait and guard of csrc/cuda in turn; a test must notice.

    python tests/kernels/mutate.py [--jobs N] [--match TEXT] [--list]

All deletions are compiled into one library, each asleep until UVC_MUTANT names it, so there is one build. Its
kernels take the place of those of the installed extension. A first run says which tests reach which place;
then every deletion runs those, the quickest first, until one fails, aborts or does not end. Exit code 1 when
one is not noticed, unless `HARMLESS` says why that is right.
"""

import argparse
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import uvc_kernels

ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(f"tests/kernels/test_cuda_{name}.py" for name in ("attention", "positions", "pieces", "launch"))
UNITS = ("host.cpp", "host_attention.cpp", "host_attention_backward.cpp", "host_bias_gradient.cpp")
# Where nothing runs on a GPU: the machine that runs kernels here.
LEFT_OUT = ("emulation.h",)
LIMIT_S = 300  # of computing; the tests take a tenth of it
PLACES = 1024
NOT_REACHED = "no test reaches it"
# Deletions that change no result, by their file and line, with the reason; these are not run.
ALIKE = "all that write there write the same"
HARMLESS = {
    "activate.cu: if (first < n) work(first, n - first < kEach ? static_cast<int>(n - first) : kEach);": "a "
    "thread behind the end has a negative count and touches nothing",
    "attention.cu: if (round == 0) {": "a later round would wait for what has arrived, and bring nothing",
    "attention.cu: if (left < 16) {": "the loop inside passes over every key that exists",
    "attention.cu: if (__any_sync(ALL_LANES, grown)) {": "scaling down when nothing has grown is exact",
    "attention.cu: if (n >= v_steps) break;": "sums of dims that a head does not have are not written",
    "attention.cu: if (part < parts) {": "a part behind the last has no token to bring",
    "attention.cu: if (first >= N) continue;": "what a warp without queries computes is not written",
    "attention.h: if (piece >= used) continue;": "it brings zeros to where nothing reads",
    "attention.h: if (lane % 4 != 0) return;": ALIKE,
    "attention_backward.cu: if (n >= steps) break;": "sums of dims that a head does not have are not written",
    "attention_backward.cu: if (first + 16 * kOwned > N) {": "the loop inside passes over every key that "
    "exists",
    "attention_backward.cu: if (part < parts) {": "a part behind the last has no token to bring",
    "group_scores.cu: if (lane == 0) out[row] = sum;": ALIKE,
    "mma.h: if (running->shuffles) return multiply_by_shuffles(sums, a, b);": "shuffles multiply alike",
    "prox_shrink.cu: if (all_one) return;": "times one is exact",
    "pieces.h: if (left > 0) work(row, column, left < 8 ? left : 8);": "a lane behind the end has a count "
    "below one and touches nothing",
    "pieces.h: if (blocks == 0) return;": "a matrix without blocks is found by no block",
    "pieces.h: if (pieces_.count > 0) launch_(pieces_, blocks_);": "a launch of no block is none",
    "pieces.h: if (pieces_.count == kPieces) flush();": "a launch for each matrix does the same",
}
WHYS = set(HARMLESS.values())

SWITCH = """
inline bool uvc_reached[PLACES] = {};
inline bool uvc_off(int place) {
  static const int mutant = std::getenv("UVC_MUTANT") ? std::atoi(std::getenv("UVC_MUTANT")) : -1;
  uvc_reached[place] = true;
  return place == mutant;
}
extern "C" inline __attribute__((visibility("default"), used)) bool* uvc_places() { return uvc_reached; }
extern "C" inline __attribute__((visibility("default"), used)) void uvc_record(long long* to) {
  using namespace uvc::host;
  to[0] = matrix_loads.exchange(0), to[1] = matrix_turns.exchange(0);
  for (int i = 0; i < 3; ++i) to[2 + i] = last_launch[i];
  to[5] = driver.calls.exchange(0), to[6] = 0;
  for (auto& loads : scheduler_loads) to[6] = std::max<long long>(to[6], loads.exchange(0));
}
""".replace("PLACES", str(PLACES))
# What is not one statement on a line: old text, new text with PLACE, and what it is.
REORDERED = (
    (
        "copies_arrived(ahead - 1);\n{0}__syncthreads();\n"
        "{0}// behind the barrier nobody reads the slot before this one, which is the free one\n"
        "{0}bring_part(part + ahead);",
        "if (PLACE) bring_part(part + ahead);\n{0}copies_arrived(ahead - 1);\n{0}__syncthreads();\n"
        "{0}if (!PLACE) bring_part(part + ahead);",
        "a slot is filled before the barrier",
    ),
    ("ahead = parts <= slots ?", "ahead = parts <= slots || PLACE ?", "no slot of the ring stays free"),
)


class Mutant(NamedTuple):
    """A deletion: where it is and what is deleted."""

    place: int
    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"

    @property
    def key(self) -> str:
        """What stays when lines are added above."""
        return f"{self.file}: {self.what}"


def closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return -1


def switched(line: str, place: str) -> str | None:
    """The line with what it waits for or guards under a switch; None where it does neither."""
    if found := re.search(r"\b(__syncthreads|copies_arrived|commit_copies)\(", line):
        if line.lstrip().startswith("__device__") or "running->" in line or "void" in line:
            return None
        return f"{line[: found.start()]}if (!{place}) {line[found.start() :]}"
    if found := re.search(r"const (std::lock_guard<std::mutex> (\w+)\((\w+)\);)", line):
        _, name, mutex = found.groups()
        lock = f"std::unique_lock<std::mutex> {name}({mutex}, std::defer_lock); if (!{place}) {name}.lock();"
        return f"{line[: found.start()]}{lock}"
    if found := re.search(r"\bif \(", line):
        end = closing(line, found.end() - 1)
        if end < 0:
            return None
        condition, rest = line[found.end() : end], line[end + 1 :]
        leaves = re.match(r" (return|continue|break);", rest)
        test = f"!{place} && ({condition})" if leaves else f"{place} || ({condition})"
        return f"{line[: found.end()]}{test}){rest}"
    if found := re.search(r"(\bconst bool \w*there = )(.*);$", line):
        return f"{line[: found.end(1)]}{place} || ({found[2]});"
    if found := re.search(r"(?<=[ ({])((?:token(?: \+ 8)?|from|key|i) (?:<|>=) [^?:;]*?) \? ", line):
        return f"{line[: found.start()]}({place} || ({found[1]})) ? {line[found.end() :]}"
    return None


def mutated(folder: Path) -> list[Mutant]:
    """Writes csrc with all switches into `folder`; the deletions in it."""
    found: list[Mutant] = []
    for source in sorted((ROOT / "csrc").rglob("*")):
        if source.suffix not in (".cu", ".cpp", ".h", ".inc"):
            continue
        text, target = source.read_text(), folder / source.relative_to(ROOT / "csrc")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.name == "cuda" and source.name not in LEFT_OUT and source.suffix in (".cu", ".h"):
            text = _with_switches(source.name, text, found)
        if source.name == "device.h":
            text = text.replace('#include "cuda/emulation.h"', '#include "cuda/emulation.h"\n' + SWITCH, 1)
        target.write_text(text)
    return found


def _with_switches(file: str, text: str, found: list[Mutant]) -> str:
    def place(line: int, what: str) -> str:
        found.append(Mutant(len(found), file, line, what))
        return f"uvc_off({len(found) - 1})"

    for old, new, what in REORDERED:
        for indent in ("          ", "      ", "    "):
            if (before := old.replace("{0}", indent)) in text:
                line = text[: text.index(before)].count("\n") + 1
                after = new.replace("{0}", indent)
                # The place of what is reordered stands on lines that stay as they are below.
                text = text.replace(before, after.replace("PLACE", place(line, what)))
                break
    lines, on_gpu, shift = [], [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("#if"):
            on_gpu.append("__CUDACC__" in line and not line.startswith("#ifndef"))
        elif line.startswith("#else"):
            on_gpu[-1] = not on_gpu[-1] and False
        elif line.startswith("#endif"):
            on_gpu.pop()
        code = line.split("//")[0].rstrip()
        if not any(on_gpu) and "uvc_off" not in code and "constexpr" not in code and "#" not in code:
            if switched(code, "") is not None:
                line = switched(code, place(number - shift, code.strip()))
        elif "if (uvc_off" in code and "bring_part" in code:
            shift += 1
        lines.append(line)
    return "\n".join(lines)


def build(folder: Path, jobs: int) -> Path:
    """Compiles the switched host build."""
    from torch.utils.cpp_extension import include_paths, library_paths

    csrc = folder / "csrc"
    flags = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    flags += ["-Wno-psabi", "-Wno-unknown-pragmas", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{path}" for path in (csrc, *include_paths())]

    def compiled(unit: str) -> str:
        out = str(folder / f"{unit}.o")
        subprocess.run(["g++", *flags, *includes, "-c", csrc / "cuda" / unit, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, UNITS))
    library = folder / "mutants.so"
    libraries = [f"-L{path}" for path in library_paths()]
    command = ["g++", "-shared", *objects, *libraries, "-ltorch", "-ltorch_cpu", "-o", library]
    subprocess.run(command, check=True)
    return library


class Runner:
    """A plugin of pytest: once collected, the tests run in forks of that process, one per deletion."""

    def __init__(self, mutants: list[Mutant], library: Path, folder: Path, jobs: int):
        places = ctypes.CDLL(str(library)).uvc_places
        places.restype = ctypes.POINTER(ctypes.c_bool)
        self.places, self.mutants, self.folder, self.jobs = places(), mutants, folder, jobs
        self.record = ctypes.CDLL(str(library)).uvc_record
        # What tests ask of the machine that ran the kernels: it is this library's.
        uvc_kernels._C.host_record = self._host_record
        self.missed: list[Mutant] | None = None
        self.report = lambda report: None  # what a fork does with the reports of its tests

    def _host_record(self) -> tuple[int, ...]:
        numbers = (ctypes.c_longlong * 7)()
        self.record(numbers)
        return tuple(numbers)

    def pytest_runtest_logreport(self, report):
        self.report(report)

    def pytest_runtestloop(self, session) -> bool:
        began = time.monotonic()
        reach = self._reach(session.items)
        if reach is None:
            return True
        print(f"{len(session.items)} tests pass without any, in {time.monotonic() - began:.0f} s", flush=True)
        self.missed, noticed, harmless = [], 0, 0
        for mutant, how, seconds in self._outcomes([(m, reach[m.place]) for m in self.mutants]):
            if how in (None, NOT_REACHED):
                self.missed.append(mutant)
                how = f"NOT NOTICED: {how or 'all tests pass'}"
            else:
                noticed, harmless = noticed + (how not in WHYS), harmless + (how in WHYS)
            print(f"{mutant}\n    {how}, {seconds:.0f} s", flush=True)
        print(
            f"{len(self.mutants)} deletions: {noticed} noticed, {harmless} change no result, "
            f"{len(self.missed)} not noticed, in {time.monotonic() - began:.0f} s"
        )
        return True

    def _reach(self, items: list) -> dict[int, list] | None:
        """The tests that reach each place, the quickest first; None where one fails without a deletion."""
        record = self.folder / "reached.tsv"

        def note(report):
            if report.when == "call":
                reached = " ".join(str(i) for i in range(PLACES) if self.places[i])
                with record.open("a") as file:
                    file.write(f"{report.nodeid}\t{report.duration:.3f}\t{reached}\n")
            for i in range(PLACES):
                self.places[i] = False

        process = self._start(items, -1, note)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0:
            print((self.folder / "-1.log").read_text()[-3000:], "\nthe tests fail without any deletion")
            return None
        named = {item.nodeid: item for item in items}
        lines = [line.split("\t") for line in record.read_text().splitlines()]
        lines.sort(key=lambda fields: float(fields[1]))
        reached = [(named[name], set(map(int, places.split()))) for name, _, places in lines]
        return {m.place: [item for item, places in reached if m.place in places] for m in self.mutants}

    def _start(self, items: list, mutant: int, note=lambda report: None) -> int:
        """Runs these tests in a fork until one fails; its process id."""
        sys.stdout.flush()
        if (process := os.fork()) != 0:
            return process
        code = 3
        try:
            log = os.open(self.folder / f"{mutant}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["UVC_MUTANT"] = str(mutant)
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            failed = []

            def see(report):
                note(report)
                if report.failed:
                    failed.append(report)
                    print(report.longreprtext, flush=True)

            self.report = see
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                if failed:
                    break
            code = 1 if failed else 0
        finally:
            os._exit(code)

    def _outcomes(self, waiting: list[tuple[Mutant, list]]):
        """Yields (deletion, what happened or None where all tests pass, seconds)."""
        running: dict[int, tuple[Mutant, float]] = {}
        waiting = list(reversed(waiting))
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant, items = waiting.pop()
                if mutant.key in HARMLESS:
                    yield mutant, HARMLESS[mutant.key], 0.0
                elif not items:
                    yield mutant, NOT_REACHED, 0.0
                else:
                    running[self._start(items, mutant.place)] = (mutant, time.monotonic())
            time.sleep(0.05)
            for process, (mutant, began) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended == 0:
                    continue
                del running[process]
                seconds = time.monotonic() - began
                if os.WIFSIGNALED(status):
                    sign = signal.Signals(os.WTERMSIG(status))
                    never = f"computes for more than {LIMIT_S} s"
                    yield mutant, never if sign == signal.SIGXCPU else f"aborts by {sign.name}", seconds
                else:
                    yield mutant, {0: None, 1: "a test fails"}[os.waitstatus_to_exitcode(status)], seconds


def main() -> int:
    """Prints two lines per deletion and the sum; 1 when one that matters is not noticed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--match", default="", help="only deletions whose line has this text")
    parser.add_argument("--list", action="store_true", help="print the deletions and end")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mutants = [m for m in mutated(folder / "csrc") if options.match in str(m)]
        if options.list:
            print(*mutants, sep="\n")
            return 0
        library = build(folder, options.jobs)
        print(f"{len(mutants)} deletions, built in {time.monotonic() - began:.0f} s", flush=True)
        os.chdir(ROOT)
        os.environ["OMP_NUM_THREADS"] = "1"
        import pytest
        import torch

        torch.ops.load_library(library)
        runner = Runner(mutants, library, folder, options.jobs)
        quiet = ("-qq", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout")
        pytest.main([*quiet, *TESTS], [runner])
    return 2 if runner.missed is None else 1 if runner.missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether something got slower: against a saved CSV, or against another commit, measured side by side."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import uvc_kernels

import uvc
from uvc.bench import worker
from uvc.bench.rows import BASES, Row, labelled, latest
from uvc.bench.timing import Timing, ratio

WARM_UPS = 2
TOO_NOISY = 0.2  # a band this wide says that the machine was busy, not that nothing changed


class Comparison(NamedTuple):
    """What was before and is now, both in `unit`, of which more is better, and the band of what is noise."""

    name: str
    before: float
    now: float
    band: float
    unit: str

    @property
    def slower(self) -> bool:
        """Whether it is slower by more than the band, however wide. Written so that nan is slower."""
        return not self.now * (1 + self.band) >= self.before

    @property
    def agrees(self) -> bool:
        """Whether both are equal but for the noise; nan never is."""
        return max(self.now / self.before, self.before / self.now) <= 1 + self.band

    @property
    def change(self) -> str:
        """From what to what, and by how much."""
        change = self.now / self.before - 1
        return f"{self.before:.3f} -> {self.now:.3f} {self.unit} ({change:+.1%}, band ±{self.band:.1%})"

    def __str__(self) -> str:
        verdict = "SLOWER" if self.slower else "noisy" if self.band > TOO_NOISY else "ok"
        return f"{verdict:7} {self.name}: {self.change}"


def compared(old: Row, row: Row) -> Comparison:
    """Two rows of the same settings, by their speed-up; the wider of their bands counts."""
    name = f"{row.model} {row.what} keep {row.keep:g} {labelled(row)}"
    return Comparison(name, old.speedup, row.speedup, max(old.noise, row.noise), "x base")


def agreement(rows: Iterable[Row]) -> list[Comparison]:
    """The last two rows of each setting that was measured at least twice, in the order of `rows`."""
    pairs: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.variant not in BASES:
            pairs.setdefault((row.device, row.key), []).append(row)
    return [compared(*found[-2:]) for found in pairs.values() if len(found) > 1]


def compare(rows: Sequence[Row], saved: Sequence[Row], source: Path) -> list[Comparison]:
    """Speed-ups over dense timm, row by row, with the last rows of equal settings in a saved CSV.

    Ratios are compared, since they hold on a machine whose speed drifts. ValueError when the file has no row
    of the same device and settings.
    """
    last = {(row.device, row.key[1:]): row for row in latest(saved)}
    found = []
    for row in rows:
        old = last.get((row.device, row.key[1:]))
        if old is None or row.variant in BASES:
            continue
        found.append(compared(old, row))
    if not found:
        row = rows[0]
        raise ValueError(
            f"--against: {source} has no row of {row.model}, {row.what}, {row.dtype}, batch {row.batch}, "
            f"{row.threads} threads on {row.device}; measure with the settings of a row in it"
        )
    return found


def against_ref(
    ref: str,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    keeps: Sequence[float],
    rounds: int,
    say: Callable[[str], None],
) -> list[Comparison]:
    """Training steps of the sources at git `ref` and of these, one at a time in turn, in two processes.

    ValueError when this is no git checkout or has no such commit; RuntimeError when the sources there cannot
    be built or run.
    """
    root = Path(uvc.__file__).resolve().parents[1]
    whole = timm.create_model(model)
    settings = {
        "model": model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "structures": {
            f"keep {keep:g}": uvc.Structure.random(whole, keep).to_json() for keep in keeps if keep < 1
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        there, here = Path(folder, "there"), Path(folder, "here")
        check_out(root, ref, there, say)
        here.mkdir()
        link(here, Path(uvc.__file__).parent, Path(uvc_kernels.__file__).parent)
        link(there, there / "uvc", there / "kernels")
        with (
            running(there, settings, f"the tree at {ref}") as before,
            running(here, settings, "this tree") as now,
        ):
            steps = before.steps
            samples = {name: ([], []) for name in steps}
            for i in range(WARM_UPS + rounds):
                for name in steps:
                    pair = [(before, samples[name][0]), (now, samples[name][1])]
                    for process, into in pair if i % 2 else reversed(pair):
                        ms = process.run(name)
                        if i >= WARM_UPS:
                            into.append(ms)
    found = []
    for name, (old, new) in samples.items():
        speedup, band = ratio(Timing(tuple(old), "wall"), Timing(tuple(new), "wall"))
        found.append(Comparison(f"{model} {name}", 1.0, speedup, band, f"x {ref}"))
    return found


def check_out(root: Path, ref: str, into: Path, say: Callable[[str], None]) -> None:
    """The sources at `ref` in the new folder `into`, with a built extension."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)

    if shutil.which("git") is None or git("rev-parse", "--git-dir").returncode:
        raise ValueError(f"--against-ref: {root} is no git checkout; compare with a CSV by --against")
    if ref.startswith("-") or git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").returncode:
        raise ValueError(f"--against-ref: {ref!r} is no commit of {root}; name a commit, branch or tag")
    archive = git("archive", "--format=tar", ref)
    if archive.returncode:
        raise RuntimeError(f"--against-ref: git archive {ref} failed: {archive.stderr.decode()[:200]}")
    into.mkdir()
    # Python before 3.11.4 has no filters.
    filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(into, **filtered)
    if not (into / "uvc").is_dir() or not (into / "kernels").is_dir():
        raise ValueError(f"--against-ref: {ref!r} has no uvc/ and kernels/ to measure; name a later commit")
    built = [path for path in Path(uvc_kernels.__file__).parent.glob("_C*.so")]
    if git("diff", "--quiet", ref, "--", "csrc", "setup.py").returncode == 0 and built:
        say(f"csrc/ is the same at {ref}: its extension is ours")
        for path in built:
            shutil.copy(path, into / "kernels" / path.name)
        return
    say(f"building the extension of {ref}")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"--against-ref: the extension of {ref} cannot be built: {last[:200]}")


def link(folder: Path, package: Path, kernels: Path) -> None:
    """`folder`/.packages with both packages under the names they are imported by."""
    packages = folder / ".packages"
    packages.mkdir()
    (packages / "uvc").symlink_to(package.resolve())
    (packages / "uvc_kernels").symlink_to(kernels.resolve())


class Process:
    """A worker beside the packages of one source tree."""

    def __init__(self, process: subprocess.Popen, name: str) -> None:
        self.process, self.name = process, name
        self.steps: list[str] = json.loads(self._line())

    def run(self, step: str) -> float:
        """Milliseconds of one step."""
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{step}\n")
            self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            last = (self.process.communicate()[1].strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"--against-ref: {self.name} cannot run: {last[:200]}")
        return line


@contextmanager
def running(tree: Path, settings: dict, name: str) -> Iterator[Process]:
    """A worker on the packages below `tree`, ended when the block ends."""
    command = [sys.executable, str(Path(worker.__file__).resolve()), json.dumps(settings)]
    # Ahead of the installed packages and of the folder of the worker's own file.
    environment = os.environ | {"PYTHONPATH": str(tree / ".packages"), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Process(process, name)
    finally:
        process.kill()
        process.wait()

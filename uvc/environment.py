"""Where a run or a measurement takes place: the device, the processor's name, versions, the commit."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("uvc-vit", "torch", "timm", "triton")
# How many processes there are, and which this one is: as torchrun says, and the MPIs with which Accelerate
# starts processes on CPUs.
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


def processor() -> str:
    """The CPU's marketing name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def slug(name: str) -> str:
    """A name fit for a folder: lower case, words joined by dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


@cache
def commit() -> str:
    """The short commit of the source tree, with a + when tracked files differ from it; else 'unknown'."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # A folder without its own history must not name that of a folder around it.
        if Path(git("rev-parse", "--show-toplevel") or "/").resolve() != root.resolve():
            return "unknown"
        head = git("rev-parse", "--short", "HEAD")
        # Appending results is what measuring does; it changes nothing that is measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except OSError:
        return "unknown"
    return f"{head}+" if changed else head or "unknown"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def versions_line() -> str:
    """`versions()` in one field of a table."""
    return ", ".join(f"{name} {found}" for name, found in versions().items())


def choose_device(name: str | None, threads: int | None) -> torch.device:
    """The device of --device, with --threads set for torch; ValueError for one that is not here."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r} is unknown; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def launched() -> int:
    """How many processes a launcher has started, this one among them; 1 without a launcher."""
    return max(_number(COUNTS), 1)


def launched_as() -> int:
    """The rank that a launcher has given to this process; 0 without a launcher."""
    return _number(RANKS) if launched() > 1 else 0


def launcher() -> int | None:
    """The process that started this one, if that is torch's launcher, alone or in `accelerate launch`."""
    return os.getppid() if launched() > 1 and os.environ.get("TORCHELASTIC_RUN_ID") else None


def one_of_none() -> bool:
    """Whether `accelerate launch` was asked for several processes and has started one, as it does on CPUs."""
    return launched() == 1 and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys()


def _number(names: Sequence[str]) -> int:
    """The first of these environment variables that is set, as a number; 0 without one."""
    text = next((os.environ[name] for name in names if os.environ.get(name)), "0")
    return int(text) if text.isdecimal() else 0

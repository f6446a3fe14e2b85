"""The support matrix: the default tests in fresh environments of the oldest and newest supported versions.

    nox                                     oldest, and newest on every Python that is at hand
    nox -s oldest -- tests/kernels          what follows -- goes to pytest
    nox -s newest-3.12

Each environment (about 6 GB) is made for a session, in a clone of the repository with the changes of the
working tree, and is deleted after it. docs/support.md holds what passed.
"""

import os
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"

# The lower bounds of pyproject.toml and what belongs to them: Triton 3.6's interpreter fails under NumPy 2.4.
OLDEST = (
    "torch==2.10.0",
    "torchvision==0.25.0",
    "triton==3.6.0",
    "timm==1.0.26",
    "torchdata==0.11.0",
    "accelerate==1.2.1",
    "numpy==2.3.5",
)
PYTHONS = ("3.11", "3.12", "3.13")
BUILD = ("setuptools>=77", "wheel", "ninja")
SHOWN = ("torch", "torchvision", "triton", "timm", "numpy")

if shutil.which("pyenv"):
    # pyenv offers only the versions that it is told to.
    found = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    os.environ.setdefault("PYENV_VERSION", ":".join(v for v in found if v.startswith(PYTHONS)))


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The oldest supported torch, timm, Triton and Python."""
    check(session, OLDEST)


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """What a plain install resolves to."""
    check(session, ("torch>=2.10", "timm>=1.0.26"))


def check(session: nox.Session, versions: tuple[str, ...]) -> None:
    """Installs these versions, builds, tests and prints the row for docs/support.md."""
    folder = Path(session.create_tmp()) / "clone"
    try:
        clone(session, folder)
        session.chdir(folder)
        session.install(*BUILD, *versions)
        session.install("--no-build-isolation", "-e", ".[test]", *versions)
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "PYTHONPATH": None}
        command = ["python", "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "-p", "no:cacheprovider"]
        try:
            session.run(*command, *session.posargs, env=environment)
            outcome = "passed"
        except nox.command.CommandFailed:
            outcome = "failed"
            raise
        finally:
            row = "import importlib.metadata as m, platform as p; print(' | '.join([p.python_version(), "
            row += f"*map(m.version, {SHOWN})]))"
            installed = session.run("python", "-c", row, silent=True, env=environment).strip()
            session.log(f"| {installed} | {processor()} | {date.today()} | {outcome} |")
    finally:
        session.chdir(Path(__file__).parent)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def clone(session: nox.Session, folder: Path) -> None:
    """The repository in `folder`, with what is changed or new in the working tree."""
    shutil.rmtree(folder, ignore_errors=True)
    session.run("git", "clone", "--quiet", ".", str(folder), external=True)
    changed = ["git", "ls-files", "-z", "--modified", "--deleted", "--others", "--exclude-standard"]
    for name in filter(None, session.run(*changed, external=True, silent=True).split("\0")):
        if Path(name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def processor() -> str:
    """The processor's name, as `lscpu` shows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"

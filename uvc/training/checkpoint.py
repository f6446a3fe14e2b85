"""The state of an unfinished run in one safetensors file: tensors by name, the rest as JSON in its metadata,
and a checksum of both. The last two are kept. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from uvc.io.files import write_tensors

HELD = "held"  # the group of tensors that stand in the facts
PARTS = "parts"  # in the facts: files beside this one that are part of it, with their checksums
More = Callable[[dict[str, Any]], dict[str, dict[str, Tensor]]]


class _Copy(NamedTuple):
    """What a file is to hold, apart from what goes on training."""

    flat: dict[str, Tensor]  # on the CPU
    facts: str

    @classmethod
    def of(cls, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> _Copy:
        held: dict[str, Tensor] = {}
        facts = _take_out(facts, held)
        flat = {
            f"{group}/{name}": t.detach().to("cpu", copy=True).contiguous()
            for group, part in {**tensors, HELD: held}.items()
            for name, t in part.items()
        }
        return cls(flat, json.dumps(facts))

    def also(self, facts: dict[str, Any]) -> _Copy:
        """With more facts."""
        return self._replace(facts=json.dumps({**json.loads(self.facts), **facts}))

    def checksum(self) -> str:
        return _checksum(self.flat, self.facts)

    def write(self, path: Path, replaces: bool = False) -> None:
        """replaces: what is there is not kept as the one before."""
        about = {"facts": self.facts, "sha256": self.checksum()}
        write_tensors(path, self.flat, about, None if replaces else _keep_before)


class Checkpoints:
    """The file of an unfinished run, written by a thread of its own. As a context it ends when what was begun
    is written.

    OSError, where the next one begins or the context ends, if one could not be written.
    """

    shared = False  # whether all processes write

    def __init__(self, path: Path | None) -> None:
        """path: None where nothing is to be written."""
        self.path = path
        self.damaged = False  # what is there cannot be read, so the one before it stays
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Copies, on this thread, and begins to write."""
        self.wait()
        check_space(self.path, sum(t.nbytes for part in tensors.values() for t in part.values()))
        copy, replaces, self.damaged = _Copy.of(tensors, facts), self.damaged, False
        self._thread = threading.Thread(target=self._write, args=(copy, replaces), name="checkpoint")
        self._thread.start()

    def _write(self, copy: _Copy, replaces: bool) -> None:
        try:
            copy.write(self.path, replaces)
        except OSError as error:
            self._error = error

    def wait(self) -> None:
        """Returns when what was begun is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load(self, more: More | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The newest that can be read; of a damaged one before it a warning tells. ValueError if none can.

        more: the tensors, by group, that are not in the file, by its facts; ValueError if there are none.
        """
        try:
            return _load(self.path, more)
        except ValueError as error:
            before = before_of(self.path)
            if not before.exists():
                raise
            found = _load(before, more)
            if self.path.exists():
                self.damaged = True
                warnings.warn(f"{error}; the run goes on from the one before, {before}", stacklevel=2)
            return found

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
            self.wait()


def before_of(path: Path) -> Path:
    """Where the checkpoint before that at `path` is kept."""
    return path.with_stem(f"{path.stem}-before")


def parts_of(path: Path) -> Path:
    """The folder of what several processes have written of checkpoints at `path`."""
    return path.with_name(f"{path.stem}-parts")


def facts_of(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, but for tensors in them; of one that cannot be read none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, KeyError, ValueError, OSError):
        return {}


def has_run(path: Path) -> bool:
    """Whether there is a checkpoint, or one before it."""
    return path.exists() or before_of(path).exists()


def delete_run(path: Path) -> None:
    """Removes the checkpoints of a finished run."""
    for file in (before_of(path), path):
        file.unlink(missing_ok=True)
    shutil.rmtree(parts_of(path), ignore_errors=True)


def save_run(path: Path, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Writes groups of tensors and JSON facts; the file is whole or the old one stays."""
    _Copy.of(tensors, facts).write(path)


def check_space(path: Path, size: int) -> None:
    """OSError unless a file of so many bytes fits on the disk."""
    free = _free(path.parent)
    if free < size:
        raise OSError(f"{path} cannot be written: {_mb(free)} are free, it takes {_mb(size)}")


def check_room(out: Path, model: nn.Module, copies: int) -> None:
    """ValueError unless the checkpoints of a run fit on the disk of `out`: two, and one being written.

    copies: of the weights, beside themselves and the moments.
    """
    weights = sum(p.nbytes for p in model.parameters())
    # Weights, two moments of AdamW.
    size = 3 * (3 + copies) * weights + weights
    kept = (*out.glob("**/checkpoint*.safetensors"), *out.glob("**/checkpoint-parts/*/*.safetensors"))
    there = sum(file.stat().st_size for file in kept)
    folder = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if (free := _free(folder) + there) < size:
        raise ValueError(
            f"out: {str(out)!r} has {_mb(free)} free, the checkpoints of this run take {_mb(size)}; "
            "make room, or name a folder on another disk"
        )


def _free(folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total else math.inf  # some file systems do not say


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _keep_before(path: Path) -> None:
    """What is at `path` is also the one before, which it replaces; at any moment `path` is whole."""
    link = path.with_name(f".{path.name}.{os.getpid()}.before")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, before_of(path))
    except OSError:  # a file system without hard links
        os.replace(path, before_of(path))


def _checksum(flat: Mapping[str, Tensor], facts: str) -> str:
    seen = hashlib.sha256(facts.encode())
    for name, tensor in sorted(flat.items()):
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        seen.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def _load(path: Path, more: More | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    tensors, facts = load_run(path)
    if PARTS in facts and more is not None:
        for group, part in more(facts[PARTS]).items():
            tensors.setdefault(group, {}).update(part)
    return tensors, facts


def load_run(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Inverse of ``save_run``; a file that is damaged or foreign is a ValueError that names it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata["facts"])
            flat = {name: file.get_tensor(name) for name in file.keys()}
        # Older versions wrote no checksum.
        if metadata.get("sha256") not in (None, _checksum(flat, metadata["facts"])):
            raise ValueError("its checksum is of other content")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable checkpoint of a run ({error}); delete it to start afresh"
        ) from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        group, _, key = name.partition("/")
        tensors.setdefault(group, {})[key] = tensor
    return tensors, _put_back(facts, tensors.pop(HELD, {}))


def _take_out(value: Any, held: dict[str, Tensor]) -> Any:
    """The value without its tensors, which go to ``held``: a loader's state may have some."""
    if isinstance(value, Tensor):
        held[str(len(held))] = value
        return {HELD: str(len(held) - 1)}
    if isinstance(value, dict):
        return {key: _take_out(item, held) for key, item in value.items()}
    return [_take_out(item, held) for item in value] if isinstance(value, (list, tuple)) else value


def _put_back(value: Any, held: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {HELD}:
            return held[value[HELD]]
        return {key: _put_back(item, held) for key, item in value.items()}
    return [_put_back(item, held) for item in value] if isinstance(value, list) else value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimiser moments as "parameter name:moment name" -> tensor."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[p]}:{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def set_seed(seed: int, numpy: bool) -> None:
    """Seeds torch, and numpy's global generator if ``numpy``."""
    torch.manual_seed(seed)
    if numpy:
        np.random.seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's, numpy's and Python's global generators, and of the device's, as tensors."""
    _, key, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy_key": torch.from_numpy(key.astype(np.int64)),
        "numpy_place": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of ``random_state``; generators that an older checkpoint did not know stay as they are."""
    torch.set_rng_state(tensors["torch"])
    if "numpy_key" in tensors:
        key = tensors["numpy_key"].numpy().astype(np.uint32)
        gauss = float(tensors["numpy_gauss"])
        np.random.set_state(("MT19937", key, *tensors["numpy_place"].tolist(), gauss))
    if "python" in tensors:
        version, *words = tensors["python"].tolist()
        next_gauss = next(iter(tensors["python_gauss"].tolist()), None)
        random.setstate((version, tuple(words), next_gauss))
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, flat: dict[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``, for a fresh optimiser over the same model."""
    parameters = dict(model.named_parameters())
    for name, tensor in flat.items():
        parameter, _, key = name.rpartition(":")
        if parameter not in parameters:
            raise ValueError(
                f"checkpoint: optimiser state of unknown parameter {parameter!r}; it belongs to another model"
            )
        # The step count lies beside the parameter in a fused optimiser only.
        on_device = tensor.dim() > 0 or optimizer.defaults.get("fused")
        device = parameters[parameter].device if on_device else "cpu"
        optimizer.state[parameters[parameter]][key] = tensor.to(device)

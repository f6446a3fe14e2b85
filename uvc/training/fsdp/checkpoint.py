"""Checkpoints of a model that is spread: every process writes its part, by `torch.distributed.checkpoint`, as
safetensors, and rank 0 then the file of an unfinished run, which names them with their checksums.

So a run that is killed finds the last file, whose parts are whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from uvc.io.files import one_line
from uvc.training.checkpoint import PARTS, Checkpoints, _Copy, before_of, check_space, facts_of, parts_of
from uvc.training.exchange import Lost


class SpreadCheckpoints(Checkpoints):
    """Those of all processes, each of which calls `save`."""

    shared = True

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        # What a thread exchanges must not come between what training exchanges.
        self._group = dist.new_group(backend="gloo") if path is not None else None
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def save(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        self.wait()
        parts = {
            f"{group}/{name}": self._copied(tensor)
            for group, part in tensors.items()
            for name, tensor in part.items()
            if isinstance(tensor, DTensor)
        }
        rest = {
            group: {name: tensor for name, tensor in part.items() if not isinstance(tensor, DTensor)}
            for group, part in tensors.items()
        }
        # One folder holds the parts of all processes, and the file of the rest.
        written = (*parts.values(), *(t for part in rest.values() for t in part.values()))
        check_space(self.path, sum(t.numel() * t.element_size() for t in written))
        replaces, self.damaged = self.damaged, False
        arguments = (parts, _Copy.of(rest, facts), replaces, facts["steps"])
        self._thread = threading.Thread(target=self._write_parts, args=arguments, name="checkpoint")
        self._thread.start()

    def _copied(self, tensor: DTensor) -> DTensor:
        local = tensor.to_local().detach().to("cpu", copy=True)
        return DTensor.from_local(
            local, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _write_parts(self, parts: dict[str, Tensor], rest: _Copy, replaces: bool, steps: int) -> None:
        folder, main = parts_of(self.path) / str(steps), dist.get_rank() == 0
        try:
            if main:
                shutil.rmtree(folder, ignore_errors=True)  # what a process that was killed has left
                folder.mkdir(parents=True)
            dist.barrier(self._group)
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(parts, storage_writer=writer, process_group=self._group)
            mine = f"shard-{dist.get_rank() + 1:05}-"
            sums = {file.name: _checksum(file) for file in folder.iterdir() if file.name.startswith(mine)}
            found: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(found, sums, self._group)
            if main:
                named = {name: digest for part in found for name, digest in part.items()}
                rest.also({PARTS: {"folder": folder.name, "sha256": named}}).write(self.path, replaces)
                self._tidy()
        except OSError as error:
            self._error = error
        except dcp.CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            self._error = OSError(f"{folder} cannot be written: {one_line(first)}")
        except RuntimeError as error:
            self._error = Lost(f"process {dist.get_rank()} has lost another one ({one_line(error):.160})")

    def _tidy(self) -> None:
        """Removes the parts that neither of the last two files names."""
        files = [file for file in (self.path, before_of(self.path)) if file.exists()]
        named = {facts_of(file).get(PARTS, {}).get("folder") for file in files}
        for folder in parts_of(self.path).iterdir():
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)


def _checksum(file: Path) -> str:
    """Of a file, whose content is then on the disk."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_parts(folder: Path, sums: Mapping[str, str], model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors that were written in parts, by group and name: for a model that is spread this process's
    rows, else whole. ValueError unless all parts are there as they were written.
    """
    for name, digest in sums.items():
        file = folder / name
        if not file.exists() or _checksum(file) != digest:
            raise ValueError(f"{file}: not the part of a checkpoint that was written")
    reader = HuggingFaceStorageReader(str(folder))
    parameters, targets = dict(model.named_parameters()), {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        parameter = parameters.get(name.partition("/")[2].partition(":")[0])
        if isinstance(parameter, DTensor) and parameter.shape == about.size:
            targets[name] = torch.empty_like(parameter, dtype=about.properties.dtype)
        else:
            targets[name] = torch.empty(about.size, dtype=about.properties.dtype)
    dcp.load(
        targets, storage_reader=reader, no_dist=not any(isinstance(t, DTensor) for t in targets.values())
    )
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in targets.items():
        group, _, key = name.partition("/")
        found.setdefault(group, {})[key] = tensor
    return found

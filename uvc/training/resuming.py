"""A run that can be stopped: what it writes of itself between two steps, and how it goes on from that."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from uvc.config import Config
from uvc.io.finite import refuse_not_finite
from uvc.settings import from_dict, hints
from uvc.solver import Pruner
from uvc.solver.rows import is_spread, local
from uvc.structure import structure_of
from uvc.training.checkpoint import has_run, load_optimizer_tensors, optimizer_tensors, parts_of
from uvc.training.feed import Feed
from uvc.training.loss_scale import LossScale
from uvc.training.processes import Alone

# How a run is to be watched and kept, which changes nothing of what it computes.
NOT_COMPARED = ("checkpoint_every", "checkpoint_minutes", "skip_not_finite", "fsdp", "compile")


class Resumable:
    """The state of a run between two steps, and its checkpoint."""

    train_loader: DataLoader
    feed: Feed  # of its batches, with the random states

    def __init__(
        self, model: nn.Module, config: Config, file: Path | None, processes: Alone, settings: dict[str, Any]
    ) -> None:
        """settings: of this run beside `config`. A checkpoint belongs to one set of both."""
        self.model, self.config, self.file, self.processes = model, config, file, processes
        self.checkpoints = processes.checkpoints(file, model)
        self.settings = _json_like({**asdict(config), **settings})
        for name in NOT_COMPARED:
            del self.settings[name]
        self.history: list[dict[str, Any]] = []
        self.steps, self.saved = 0, time.monotonic()
        self.skipped = 0  # steps that were not finite
        self.scale = LossScale(config.precision)
        self.average: ModelEmaV3 | None = None  # of the weights, in the phases that have one
        self.resumed: dict[str, Any] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def _kept(self) -> str:
        if self.file is None:
            return "nothing of this run is kept"
        self.checkpoints.wait()
        return f"{self.file} keeps what was saved last" if has_run(self.file) else "nothing was saved yet"

    def _save(
        self, phase: str, epoch: int, optimizer: torch.optim.Optimizer, pruner: Pruner, done: int = 0
    ) -> None:
        """Writes what a run needs to go on in an epoch of which some batches are done."""
        if self.file is None:
            return
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(optimizer, self.model)}
        tensors["random"], loader = self.feed.state()
        for name in tensors["random"].keys() & {"torch", "cuda"}:
            states = self.processes.each(tensors["random"][name])
            tensors["random"] |= {f"rank{rank}/{name}": states[rank] for rank in range(1, len(states))}
        if self.average:
            tensors["average"] = self.average.module.state_dict()
        tensors["search"] = pruner.state_dict()
        # Weights, moments, averages and scores alike: from values that are not finite no run can go on.
        named = {f"{group} {name}": t for group, part in tensors.items() for name, t in part.items()}
        numbers = {name: local(t) for name, t in named.items() if not name.startswith("random ")}
        refuse_not_finite(numbers, f"{phase}: epoch {epoch}, batch {done}: not saved")
        facts = {
            "phase": phase,
            "epoch": epoch,
            "done": done,
            "loader": loader,
            "history": self.history,
            "steps": self.steps,
            "skipped": self.skipped,
            "loss_scale": self.scale.state(),
        }
        structure = structure_of(self.model).to_json() if phase == "post-train" else None
        self.saved = time.monotonic()
        if not self.processes.main and not self.checkpoints.shared:
            return
        self.checkpoints.save(tensors, {**facts, "structure": structure, "settings": self.settings})

    def load(self) -> None:
        """Reads the checkpoint; phases before the one it names are passed over, that one continues after its
        last batch.
        """
        self.tensors, self.resumed = self.checkpoints.load(self._parts)
        if not _same(self.resumed["settings"], self.settings):
            raise ValueError(
                f"{self.file}: it was written with other settings; resume with the same ones or start afresh"
            )
        self.history, self.steps = self.resumed["history"], self.resumed["steps"]
        self.skipped = self.resumed.get("skipped", 0)

    def _parts(self, about: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """What several processes have written of a checkpoint."""
        from uvc.training.fsdp.checkpoint import read_parts

        return read_parts(parts_of(self.file) / about["folder"], about["sha256"], self.model)

    def finished(self, phase: str) -> bool:
        """Whether the loaded checkpoint is from a later phase."""
        order = ["teacher", "warmup", "search", "post-train"]
        return bool(self.resumed) and order.index(self.resumed["phase"]) > order.index(phase)

    def _restore(
        self, name: str, epochs: int, optimizer: torch.optim.Optimizer, pruner: Pruner
    ) -> tuple[int, int]:
        """The epoch to go on with, and how many of its batches are done."""
        if self.finished(name):
            return epochs, 0
        if self.resumed.get("phase") != name:
            return 0, 0
        self._spread_tensors()
        self.model.load_state_dict(self.tensors["model"])
        load_optimizer_tensors(optimizer, self.model, self.tensors["optimizer"])
        try:
            pruner.load_state_dict(self.tensors.get("search", {}))
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{self.file}: its search is of another version or method ({error}); start afresh"
            ) from None
        if self.average:
            self.average.module.load_state_dict(self.tensors["average"])
        if "loss_scale" in self.resumed:
            self.scale.load_state(self.resumed["loss_scale"])
        done = self.resumed.get("done", 0)
        inside = 0 < done < len(self.train_loader)
        self.feed.load_state(self._random(), self.resumed["loader"], inside)
        epoch, self.resumed, self.tensors = self.resumed["epoch"], {}, {}
        return epoch, done

    def _spread_tensors(self) -> None:
        """Weights and moments that were written whole are spread as the weights are."""
        parameters = dict(self.model.named_parameters())
        if not is_spread(next(iter(parameters.values()))):
            return
        from uvc.training.fsdp.spread import like

        for group in ("model", "optimizer"):
            for name, tensor in self.tensors[group].items():
                if (parameter := parameters.get(name.rpartition(":")[0] or name)) is not None:
                    self.tensors[group][name] = like(tensor, parameter)

    def _random(self) -> dict[str, Tensor]:
        """The random states that were saved of this process; of one that there was not, new ones."""
        saved, rank = self.tensors["random"], self.processes.rank
        own = {name: state for name, state in saved.items() if not name.startswith("rank")}
        if rank == 0:
            return own
        seed = hash((self.config.seed, self.steps, rank)) % (1 << 63)
        new = {"torch": torch.Generator().manual_seed(seed).get_state()}
        return own | {name: saved.get(f"rank{rank}/{name}", new.get(name)) for name in own.keys() & {"torch"}}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two settings of a run, perhaps of an older version, train alike; threads aside."""
    names = hints(Config)

    def parts(settings: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
        config = from_dict(Config, {k: v for k, v in settings.items() if k in names})
        return replace(config, threads=None), {k: v for k, v in settings.items() if k not in names}

    try:
        return parts(one) == parts(other)
    except ValueError:  # it has a setting that is unknown here
        return False


def _json_like(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _json_like(item) for key, item in value.items()}
    return [_json_like(item) for item in value] if isinstance(value, (list, tuple)) else value

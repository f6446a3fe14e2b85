"""The batches of training, taken up again in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from uvc.training.checkpoint import random_state, set_random_state
from uvc.training.signals import asked

BEGAN = "epoch/"  # before the names of the random states at the beginning of an epoch


class Feed:
    """Yields a loader's batches and can say where in an epoch it is.

    A loader with `state_dict` and `load_state_dict`, such as those of `load_data` and torchdata's
    `StatefulDataLoader`, says itself where to go on. Any other is run again, from the random states that its
    epoch began with, over the batches that have been seen.
    """

    def __init__(self, loader: Iterable, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._began: dict[str, Tensor] = {}
        self._resume: dict[str, Tensor] | None = None

    def epoch(self, done: int = 0) -> Iterator[Any]:
        """The batches of an epoch after the first ``done``, which are none or those of ``load_state``."""
        resume, self._resume = self._resume, None
        if resume is None:
            self._began = self._random()
            batches = iter(self.loader)
        else:
            if not self.stateful:
                self._began = {n.removeprefix(BEGAN): t for n, t in resume.items() if n.startswith(BEGAN)}
                self._set_random(self._began)
            batches = iter(self.loader)
            for _ in range(0 if self.stateful else done):
                next(batches)
            self._set_random(resume)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError:
                if asked():  # whoever ended this process has ended its workers, too
                    return
                raise
            yield batch

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Random states, now and at the beginning of the epoch, and the loader's own state."""
        began = {} if self.stateful else {BEGAN + name: state for name, state in self._began.items()}
        return self._random() | began, self.loader.state_dict() if self.stateful else None

    def load_state(self, random: dict[str, Tensor], place: Any, inside: bool) -> None:
        """Inverse of ``state``. inside: the epoch has begun and has batches left."""
        if self.stateful and place is not None:
            self.loader.load_state_dict(place)
        if inside:
            self._resume = random
        else:
            self._set_random(random)

    def _random(self) -> dict[str, Tensor]:
        states = random_state(self.device)
        own = getattr(self.loader, "generator", None)
        return states | ({"loader": own.get_state()} if isinstance(own, torch.Generator) else {})

    def _set_random(self, states: dict[str, Tensor]) -> None:
        set_random_state(states, self.device)
        own = getattr(self.loader, "generator", None)
        if isinstance(own, torch.Generator) and "loader" in states:
            own.set_state(states["loader"])

"""Weights & Biases and MLflow, through the trackers of Accelerate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from uvc.io.files import one_line

PROJECT = "uvc"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not here."""
    for name in names:
        if find_spec(name) is None:
            package = "mlflow-skinny" if name == "mlflow" else name
            raise ValueError(f"tracker: {name!r} is not installed; pip install {package}, or leave it out")


class Trackers:
    """The trackers of a run by name, begun when this is made.

    One that fails later is dropped with a warning: a server that is away ends no run.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """RuntimeError, in one line, for a tracker that cannot begin."""
        check_trackers(names)
        self._begun: dict[str, Any] = {}
        for name in names:
            try:
                self._begun[name] = _begin(name)
            except Exception as error:  # clients of servers fail in many ways
                raise RuntimeError(
                    f"tracker: {name} cannot begin: {one_line(error):.200}; look at its settings or leave it "
                    "out"
                ) from None

    def configure(self, settings: Mapping[str, Any]) -> None:
        """The settings of the run; nested ones get dotted names."""
        self._each("store_init_configuration", dict(_flat(settings)))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Numbers at a step of the whole run; steps do not go down."""
        self._each("log", {name: float(value) for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        """Ends what was begun; calling it twice is fine."""
        self._each("finish")
        self._begun = {}

    def _each(self, call: str, *arguments: Any, **named: Any) -> None:
        for name, tracker in list(self._begun.items()):
            try:
                getattr(tracker, call)(*arguments, **named)
            except Exception as error:
                del self._begun[name]
                warnings.warn(
                    f"{name} fails: {one_line(error):.200}; it gets no more of this run", stacklevel=2
                )


def _begin(name: str) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker, WandBTracker

    PartialState()  # which asks whether this is the main process
    if name == "wandb":
        tracker = WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT))
    else:
        tracker = MLflowTracker(PROJECT)
    # Those of older versions of accelerate have begun when they are made.
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            plain = value is None or isinstance(value, (bool, int, float, str))
            yield f"{before}{name}", value if plain else str(value)

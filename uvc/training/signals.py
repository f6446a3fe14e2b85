"""SIGTERM and SIGUSR1 ask a run to write a checkpoint and end: clusters send them before they take a machine
away. So does the end of the launcher that has started its processes: SIGUSR1 kills torchrun.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from uvc.environment import launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked = threading.Event()
_launcher: int | None = None


class Stopped(Exception):
    """A run has written its checkpoint and ended, as it was asked to."""


def asked() -> bool:
    """Whether a run has been asked to end."""
    return _asked.is_set() or _launcher not in (None, os.getppid())


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """For a while the signals only ask; who trains looks at ``asked()`` between steps. In the main thread."""
    global _launcher
    _asked.clear()
    before = {number: signal.signal(number, lambda *_: _asked.set()) for number in SIGNALS}
    _launcher = launcher()
    try:
        yield
    finally:
        _launcher = None
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()

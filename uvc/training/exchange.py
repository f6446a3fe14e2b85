"""What becomes of an exchange between processes when one of them has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from uvc.io.files import one_line


class Lost(ConnectionError):
    """Another process of the run has ended, so this one cannot go on."""


@contextmanager
def lost() -> Iterator[None]:
    """An exchange that fails is a `Lost`, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"process {dist.get_rank()} of {dist.get_world_size()} has lost another one "
            f"({one_line(error):.160})"
        ) from None

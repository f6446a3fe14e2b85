"""Warnings that are given once per process."""

import warnings

said: set[str] = set()


def warn_once(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, unless this message was given before."""
    if message not in said:
        said.add(message)
        warnings.warn(message, category, stacklevel=4)

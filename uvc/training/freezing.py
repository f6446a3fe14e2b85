"""What a run leaves untrained: parameters named by shell-style patterns."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keep the parameters that `patterns` match from being trained; ValueError as `matched`."""
    for p in matched(model, patterns):
        p.requires_grad_(False)


@contextmanager
def frozen(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """As `freeze`, until the block ends."""
    held = [p for p in matched(model, patterns) if p.requires_grad]
    try:
        for p in held:
            p.requires_grad_(False)
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


def matched(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters whose name, or that of a module around them, is as one of `patterns`: *, ? and [abc] as
    in a shell. ValueError for a pattern that matches none, and when nothing would be left to train.
    """
    parameters, found = dict(model.named_parameters()), {}
    for pattern in patterns:
        names = [name for name in parameters if any(fnmatchcase(part, pattern) for part in _around(name))]
        if not names:
            known = dict.fromkeys(part for name in parameters for part in _around(name))
            near = difflib.get_close_matches(pattern, known, n=3) or list(known)[:3]
            raise ValueError(
                f"freeze: {pattern!r} matches no parameter or module of the model; near are {', '.join(near)}"
            )
        found.update((name, parameters[name]) for name in names)
    if patterns and not any(p.requires_grad for name, p in parameters.items() if name not in found):
        raise ValueError(f"freeze: {', '.join(patterns)} leaves nothing to train; freeze less")
    return list(found.values())


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but frozen batch norms go on with the statistics that they have."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.train(not list(module.parameters()))


def _around(name: str) -> list[str]:
    """A parameter's name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]

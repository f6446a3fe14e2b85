"""Settings as frozen dataclasses: what an annotation allows, nested mappings in, TOML out.

A class calls `check_fields` in `__post_init__`; a field's annotation says what it may hold: a type, a union,
a tuple, `Literal`, or one of the ranges below.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

C = TypeVar("C")


class Rule(NamedTuple):
    """What a number must be: in words, and as a predicate that is false for nan."""

    says: str
    holds: Callable[[float], bool]


Count = Annotated[int, Rule("0 or more", lambda n: n >= 0)]
Size = Annotated[int, Rule("1 or more", lambda n: n >= 1)]
UpToThree = Annotated[int, Rule("0 to 3", lambda n: 0 <= n <= 3)]
Number = Annotated[float, Rule("a finite number", math.isfinite)]
Positive = Annotated[float, Rule("a positive number", lambda x: 0 < x < math.inf)]
Weight = Annotated[float, Rule("0 or a positive number", lambda x: 0 <= x < math.inf)]
Share = Annotated[float, Rule("in [0, 1]", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, Rule("in [0, 1)", lambda x: 0 <= x < 1)]


class BadSetting(ValueError):
    """A setting that cannot be: `field` of a config class named by `room`, and the `reason`."""

    def __init__(self, field: str, reason: str, room: str = "") -> None:
        super().__init__(f"{room}{field}: {reason}")
        self.field, self.reason = field, reason


def check_fields(config: Any, room: str = "") -> None:
    """BadSetting unless every field holds what its annotation says; lists become tuples."""
    for name, hint in hints(type(config)).items():
        try:
            object.__setattr__(config, name, check(getattr(config, name), hint))
        except ValueError as error:
            raise BadSetting(name, str(error), room) from None


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, evaluated."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def check(value: Any, hint: Any) -> Any:
    """`value`, with lists as tuples; ValueError with the reason unless it is what an annotation says."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        value = check(value, args[0])
        if not args[1].holds(value):
            raise ValueError(f"{value!r}; it must be {args[1].says}")
        return value
    if kind is Literal:
        if value not in args:
            raise ValueError(f"{value!r}; known are {', '.join(map(repr, args))}")
        return value
    if kind in (typing.Union, types.UnionType):
        return _check_any(value, args)
    if kind is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{value!r}; it must be a list")
        wanted = args[:1] * len(value) if args[-1] is ... else args
        if len(value) != len(wanted):
            raise ValueError(f"{value!r}; it must be a list of {len(wanted)} values")
        return tuple(map(check, value, wanted))
    if kind is dict and isinstance(value, Mapping):
        return {name: check(part, args[1]) for name, part in value.items()}
    wide, words = KINDS.get(kind, (kind, f"a {kind.__name__}"))
    if not isinstance(value, wide) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{value!r}; it must be {words}")
    # Scalars of numpy become Python's, which JSON and TOML can hold.
    return value.item() if hasattr(value, "item") else value


# What serves as a value of each type, and its name in words.
KINDS = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    tuple: (tuple, "a list"),
    dict: (Mapping, "a table"),
}


def _check_any(value: Any, kinds: tuple[Any, ...]) -> Any:
    if value is None and type(None) in kinds:
        return value
    words = [part for kind in kinds if typing.get_origin(kind) is Literal for part in typing.get_args(kind)]
    if isinstance(value, str) and value in words:
        return value
    kinds = tuple(k for k in kinds if k is not type(None) and typing.get_origin(k) is not Literal)
    if len(kinds) == 1:
        return check(value, kinds[0])
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return check(value, kind)
    words = " or ".join(KINDS[typing.get_origin(kind) or kind][1] for kind in kinds)
    raise ValueError(f"{value!r}; it must be {words}")


def renamed(**names: str) -> Callable[[type[C]], type[C]]:
    """A class decorator: the constructor and the instances of a dataclass also answer to old field names."""

    def decorate(cls: type[C]) -> type[C]:
        make = cls.__init__

        @functools.wraps(make)
        def __init__(self, *args: Any, **values: Any) -> None:
            # `dataclasses.replace` gives the present value under the new name too: the old is the change.
            former = {names[name]: values.pop(name) for name in names if name in values}
            make(self, *args, **values | former)

        cls.__init__, cls.OLD_NAMES = __init__, names
        for old, new in names.items():
            setattr(cls, old, property(lambda self, new=new: getattr(self, new)))
        return cls

    return decorate


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """A config from nested mappings; BadSetting, with the dotted path, for an unknown name or a bad value."""
    known, values = hints(cls), dict(data)
    for name, value in data.items():
        if name not in known and name not in getattr(cls, "OLD_NAMES", {}):
            raise BadSetting(where + name, f"no such setting; known are {', '.join(known)}")
        if is_dataclass(known.get(name)) and isinstance(value, Mapping):
            values[name] = from_dict(known[name], value, f"{where}{name}.")
    try:
        return cls(**values)
    except BadSetting as error:
        raise BadSetting(where + error.field, error.reason) from None


def to_toml(config: Any) -> str:
    """A config as TOML that `tomllib` and `from_dict` turn back into it; what is None is left out."""
    return "\n".join(_toml(config, "")) + "\n"


def _toml(config: Any, table: str) -> list[str]:
    lines, tables = [f"[{table}]"] if table else [], []
    for name in hints(type(config)):
        value = getattr(config, name)
        if is_dataclass(value):
            tables += ["", *_toml(value, f"{table}.{name}" if table else name)]
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}")
    return lines + tables


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_toml_value(str(k))} = {_toml_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)  # numbers, true and false look alike in JSON and TOML

"""The `RunConfig` of a command: the command line over a TOML file over a recipe, resolved here and once."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import timm

import uvc.models  # noqa: F401  registers the models that timm does not have
from uvc.app.run_dir import OPTIONS, check_out, read_json
from uvc.config import Config, DataConfig, RunConfig
from uvc.io.files import one_line
from uvc.recipes import AIMS, RECIPES
from uvc.settings import BadSetting, from_dict, hints
from uvc.training.data import DEFAULT_MODELS, DIGITS, check_name

# Where an option's setting stands. A file may use these names at its top, too.
PATHS = {
    **{name: f"images.{name}" for name in hints(DataConfig)},
    **{name: f"training.{name}" for name in hints(Config)},
    "lr": "training.learning_rate",
    "search_lr": "training.search_learning_rate",
    "distill": "training.distill.kind",
    "distill_features": "training.distill.features",
    "model_arg": "model_args",
    "tracker": "trackers",
    **{name: f"training.solver.{name}" for name in ("skip", "tokens", "round_to")},
    "grain": "training.solver.round_to",
}
# Settings that hold settings.
TABLES = ("images", "model_args", "training", "training.distill", "training.solver")
# Settings that change where a run computes, not what; a resumed run may be given others.
PLACES = ("device", "workers", "data_root", "teacher_cache", "trackers")
PLACES += tuple(
    f"training.{name}"
    for name in ("threads", "checkpoint_every", "checkpoint_minutes", "skip_not_finite", "fsdp", "compile")
)


class Given(NamedTuple):
    """One setting that the user gave: its dotted path in `RunConfig`, and what to call it in a message."""

    path: str
    value: Any
    label: str


def resolve(options: Mapping[str, Any], file: Path | None = None) -> RunConfig:
    """The config of a run, new or to be resumed.

    Args:
        options: of the command line by name; None where one is not given.
        file: TOML, with the settings that `uvc compress --show-config` prints, or some of them.

    Raises:
        ValueError: one line that names the option, or the file and its key.
    """
    given = [*_of_file(file), *_of_options(options)]
    given = [_begun(setting, given) if setting.path == "resume" else setting for setting in given]
    asked = {setting.path: setting for setting in given}
    if "resume" in asked and asked["resume"].value is True:
        if "out" not in asked:
            raise ValueError("--resume: no --out is given; name the folder of the run to continue")
        return _resolve_again(Path(asked["out"].value), given)
    recipe, data, model = (_text(asked.get(name)) for name in ("recipe", "data", "model"))
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"{asked['recipe'].label}: {recipe!r} is unknown; use one of {', '.join(RECIPES)}")
    aim = AIMS.get(recipe)
    if aim and data is None:
        raise ValueError(f"--data: none given; --recipe {recipe} is for ImageNet, name its folder")
    data = DIGITS if data is None else data
    recipe = recipe or (data if data in RECIPES else "default")
    base = {"recipe": recipe, "data": data, "training": asdict(RECIPES[recipe]())}
    if aim and asked.get("metric", Given("", "macs", "")).value == "macs":
        base["budget"] = aim.budget
    base["model"] = aim.model if aim else DEFAULT_MODELS.get(data)
    if model is None and base["model"] is None:
        raise ValueError(
            f"--model: none given for --data {data!r}; name a timm model such as deit_tiny_patch16_224"
        )
    run = _put_over(base, given)
    check_name(run.data)
    known_model(run.model, asked["model"].label if "model" in asked else "--model")
    return run


def _begun(resume: Given, given: list[Given]) -> Given:
    """`auto` is true where --out holds a run already."""
    out = next((setting.value for setting in given if setting.path == "out"), None)
    if resume.value != "auto" or out is None:
        return resume._replace(value=True if resume.value == "auto" else resume.value)
    return resume._replace(value=(Path(out) / OPTIONS).is_file())


def _resolve_again(out: Path, given: list[Given]) -> RunConfig:
    """The config that the run in `out` began with; ValueError for a setting that now says otherwise."""
    check_out(out, resume=True)
    begun = stored_run(out)
    now = _put_over(asdict(begun), given)
    for path, value, label in given:
        if path not in (*PLACES, "out", "resume") and _at(now, path) != _at(begun, path):
            raise ValueError(
                f"{label}: {value!r}, but the run to resume began with {_at(begun, path)!r}; leave it out"
            )
    return now


def stored_run(out: Path) -> RunConfig:
    """What `run.json` holds: a config, or, in a folder of an older version, options of the command line."""
    stored = read_json(out / OPTIONS)
    try:
        return from_dict(RunConfig, stored) if "training" in stored else resolve(stored)
    except ValueError as error:
        raise ValueError(
            f"{str(out / OPTIONS)!r}: {error}; another version of uvc wrote it, start a new run"
        ) from None


def known_model(name: str, label: str = "--model") -> str:
    """`name`; ValueError unless timm has a model of this name."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"{label}: {name!r} is no timm model; {hint}")
    return name


def _of_options(options: Mapping[str, Any]) -> Iterator[Given]:
    for name, value in options.items():
        if value is not None:
            yield from _leaves(PATHS.get(name, name), value, "--" + name.replace("_", "-"))


def _of_file(file: Path | None) -> Iterator[Given]:
    if file is None:
        return
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: {str(file)!r} cannot be read as TOML: {one_line(error)}") from None
    for key, value in tree.items():
        room = f"training.{key}"
        path = room if room in TABLES and isinstance(value, Mapping) else PATHS.get(key, key)
        yield from _leaves(path, value, f"--config {file}: {key}")


def _leaves(path: str, value: Any, label: str) -> Iterator[Given]:
    """The settings in a table one by one; what is no table of settings is one setting."""
    if path not in TABLES:
        yield Given(path, str(Path(value).absolute()) if _is_place(path, value) else value, label)
    elif not isinstance(value, Mapping):
        raise ValueError(f"{label}: {value!r}; it must be a table of settings")
    else:
        for name, part in value.items():
            yield from _leaves(f"{path}.{name}", part, f"{label}.{name}")


def _text(setting: Given | None) -> str | None:
    if setting is not None and not isinstance(setting.value, str):
        raise ValueError(f"{setting.label}: {setting.value!r}; it must be a text")
    return None if setting is None else setting.value


def _is_place(path: str, value: Any) -> bool:
    """Whether a setting names a file or folder: a run may be continued from another folder."""
    named = path in ("teacher", "teacher_cache", "data_root", "latency_table") and isinstance(
        value, str | Path
    )
    return named or (path == "data" and value != DIGITS and isinstance(value, str) and Path(value).is_dir())


def _at(config: Any, path: str) -> Any:
    """The setting at a dotted path; None where a mapping does not have it."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name)
    return config


def _put_over(base: dict[str, Any], given: list[Given]) -> RunConfig:
    """`base`, nested, with the settings put in; those that come later win."""
    labels = {}
    for path, value, label in given:
        *tables, name = path.split(".")
        table = base
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
        labels["model_args" if tables == ["model_args"] else path] = label
    try:
        return from_dict(RunConfig, base)
    except BadSetting as error:
        raise ValueError(f"{labels.get(error.field, error.field)}: {error.reason}") from None

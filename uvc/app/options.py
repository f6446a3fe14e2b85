"""Options of the command line that need more than click has: from their text to their value, and those that
several commands share.

A text that means nothing is a click.UsageError, one line that names the option, the text and what to give.
"""

import copy
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)
SEVERAL = ("--input-size", "--mean", "--std", "--scale")  # options that take several numbers


class Renamed(click.Option):
    """An option that also answers to its former names; help shows the first alone."""

    def get_help_record(self, context: click.Context) -> tuple[str, str] | None:
        """The option's line of help."""
        shown = copy.copy(self)
        shown.opts = self.opts[:1]
        return click.Option.get_help_record(shown, context)


def read_budget(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> float | dict[str, float] | list[float] | None:
    """0.5, or one model for several, as in 0.7,0.5, or a fraction for each of several metrics, as in
    macs=0.5,params=0.6.
    """
    if value is None:
        return None
    if "," in value and "=" not in value:
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            said = f"--budget: {value!r}; give fractions, largest first, as in 0.7,0.5,0.33"
            raise click.UsageError(said) from None
    named = [part.rpartition("=") for part in value.split(",")]
    try:
        found = {metric.strip(): float(fraction) for metric, _, fraction in named}
    except ValueError:
        said = f"--budget: {value!r}; give a fraction such as 0.5, or macs=0.5,params=0.6"
        raise click.UsageError(said) from None
    if len(found) < len(named) or ("" in found and len(found) > 1):
        raise click.UsageError(f"--budget: {value!r}; name each metric once, as in macs=0.5,params=0.6")
    return found.get("", found)


def read_resume(_context: click.Context, _option: click.Parameter, value: str | None) -> bool | str | None:
    """--resume alone, or --resume auto."""
    if value not in (None, "yes", "auto"):
        raise click.UsageError(f"--resume: {value!r}; give it alone, or as --resume auto")
    return True if value == "yes" else value


def read_multiples(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> list[int] | str | None:
    if value in (None, "auto"):
        return value
    parts = value.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.UsageError(
            f"--round-to: {value!r}; give two multiples, of dims and of neurons, as in 16,64, or auto"
        )
    return [int(part) for part in parts]


def read_target(_context: click.Context, _option: click.Parameter, value: str | None) -> dict[str, Any]:
    """cpu,batch=1,threads=2: a device, and numbers above zero."""
    device, *named = (value or "cpu").split(",")
    found: dict[str, Any] = {"device": device.strip()}
    for part in named:
        name, _, number = part.partition("=")
        name = name.strip()
        counts = number.strip().isdecimal() and int(number) > 0
        if not counts or name not in ("batch", "threads") or name in found:
            raise click.UsageError(
                f"--for: {value!r}; give a device, then numbers, as in cpu,batch=1,threads=1"
            )
        found[name] = int(number)
    return found


def read_numbers(_context: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    """0.5, or several numbers, as in 0.485,0.456,0.406."""
    if value is None:
        return None
    kind = int if option.name == "input_size" else float
    try:
        return [kind(part) for part in value.split(",")]
    except ValueError:
        said = f"{option.opts[0]}: {value!r}; give numbers, as in {option.metavar}"
        raise click.UsageError(said) from None


def join_numbers(arguments: Sequence[str]) -> list[str]:
    """`--mean 0.5 0.5 0.5`, as timm's script takes it, as `--mean 0.5,0.5,0.5`."""
    joined: list[str] = []
    for text in arguments:
        if len(joined) > 1 and joined[-2] in SEVERAL and re.fullmatch(r"-?[\d.]+(e-?\d+)?", text):
            joined[-1] += f",{text}"
        else:
            joined.append(text)
    return joined


def json_option(command: Callable) -> Callable:
    said = "Print the figures as JSON on stdout, and nothing else there."
    return click.option("--json", "as_json", is_flag=True, help=said)(command)


def image_options(command: Callable) -> Callable:
    for option in (
        click.option("--color-jitter", type=float, help="Of training images; 0.4."),
        click.option("--reprob", type=float, help="Probability of erasing a part of a training image; 0."),
        click.option("--aa", help="timm's name of an augmentation policy, such as rand-m9-mstd0.5."),
        click.option("--scale", callback=read_numbers, metavar="0.08,1", help="Share of an image in a crop."),
        click.option("--interpolation", help="bilinear, bicubic, ...; the model's own."),
        click.option("--std", callback=read_numbers, metavar="0.229,0.224,0.225", help="The model's own."),
        click.option("--mean", callback=read_numbers, metavar="0.485,0.456,0.406", help="The model's own."),
        click.option("--crop-pct", type=float, help="Share of an image that evaluation sees."),
        click.option(
            "--input-size",
            callback=read_numbers,
            metavar="3,224,224",
            help="Of the images, and of the model.",
        ),
    ):
        command = option(command)
    return command


def read_model_args(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any] | None:
    """NAME=VALUE: what TOML reads as a value; a word that it does not, as in global_pool=avg, is a text."""
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            if not re.fullmatch(r"[A-Za-z_][\w.-]*", value) or value in ("True", "False", "None"):
                equals = ""
            found[name] = value
        if not equals or not name.isidentifier():
            raise click.UsageError(
                f"--model-arg: {text!r}; give NAME=VALUE, as in img_size=112, dynamic_img_size=true, "
                'global_pool="avg"'
            )
    return found or None


def data_options(command: Callable) -> Callable:
    for option in (
        click.option("--workers", type=int, help="Processes that read images; 0: this one."),
        click.option("--data-root", help="Where a data set that timm names is stored."),
        click.option("--batch-size", type=int, help="Images per batch."),
        click.option("--threads", type=int, help="CPU threads for torch."),
        click.option("--device", help="cpu or cuda, perhaps with a number: cuda:1."),
        click.option("--data", help="digits, an image folder, or a timm name such as torch/cifar10."),
    ):
        command = option(command)
    return command

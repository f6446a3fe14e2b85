"""A compressed model for other programs, each checked where it ends up."""

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from uvc_kernels.warn_once import warn_once

from uvc.compaction import compact, in_form
from uvc.io.dtypes import check_runs, input_dtype, sample_images
from uvc.io.files import one_line
from uvc.io.runtimes import CHECKS, FORMATS, Program, first, need, need_compiler, write_onnx_int8
from uvc.io.serialization import load
from uvc.layers import is_compacted

# Relative to the largest output; programs of other runtimes add up in another order.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
INT8 = 0.25  # the largest difference on images that it was calibrated on
# The program is made from the first of these batches and checked on all: the batch size stays free.
BATCHES = (2, 1, 3)
# Of a model that is compacted on the way. In ONNX all heads run alone, so that padded ones are only larger.
FORM = {"onnx": "grouped"}
DTYPES = ("float32", "float16", "bfloat16")


def export(
    folder: Path,
    format: str,
    to: Path | None = None,
    *,
    dtype: str | None = None,
    calibration: Sequence[Tensor] | None = None,
    check: str | None = None,
) -> tuple[Path, float]:
    """Writes the model in `folder` in one of `FORMATS`; returns where, and the largest difference of outputs.

    A model that is not compacted is compacted on the way. The batch size is free; ONNX files say in their
    metadata, and torch.export's in `preprocessing.json`, how images are prepared.

    to: the file, for safetensors the folder; by default `export` in `folder`, named after the format. dtype:
    of weights and images, "float32", "float16" or "bfloat16"; None: the model's own. calibration: batches of
    images as the model sees them in use; products with weights are then of 8-bit numbers, in ONNX alone.
    check: a second runtime that must agree, "openvino" for ONNX.

    What is written is read back, run, and compared with the model (relative to the largest output) before it
    is put in place, and again from there, with all its files; what differs is not kept. Where ONNX's
    optimiser is to blame, it is written without, which is said once. ValueError, before any work, for an
    unknown format, runtime or place, or a package that is missing; later for a model that the format cannot
    express.
    """
    check_request(format, dtype, calibration is not None, check)
    name, write, read, *_ = FORMATS[format]
    stem, dot, end = name.partition(".")
    mark = ".int8" if calibration is not None else f".{dtype}" if dtype is not None else ""
    target = Path(folder, "export", f"{stem}{mark}{dot}{end}") if to is None else Path(to)
    model = load(folder).eval().requires_grad_(False)
    check_runs(model)
    own = str(input_dtype(model)).removeprefix("torch.")
    if calibration is not None and own != "float32":
        raise ValueError(f"--int8: its other numbers are float32, the model is in {own}; save it in float32")
    if format == "onnx" and (dtype or own) == "bfloat16":
        raise ValueError("--dtype: NumPy has no bfloat16 to run onnx with; give --dtype float32 or float16")
    batches = [sample_images(model, batch) for batch in BATCHES]
    small = suited(model, format, calibration is not None)
    if calibration is not None:
        write = partial(write_onnx_int8, images=calibration)
        batches = [calibration[0][:batch] for batch in BATCHES]
    given = batches if dtype is None else [x.to(getattr(torch, dtype)) for x in batches]
    expected = _expected(model, batches, format)
    if dtype is not None:
        # Read again, as a compacted model may share its weights.
        small = suited(load(folder), format).to(given[0].dtype)
    bound = INT8 if calibration is not None else max(TOLERANCE[x.dtype] for x in (given[0], batches[0]))
    readers = [read] + ([] if check is None else [CHECKS[format][check]])
    compare = partial(_compare, readers, given, expected, bound, format)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as draft:
            written = Path(draft, target.name)
            small.eval().requires_grad_(False)
            with torch.no_grad():
                _write(write, small, given[0], written, format)
                try:
                    compare(written)
                except (RuntimeError, ValueError):  # it differs, or is no program
                    if not FORMATS[format].optimised:
                        raise
                    for file in Path(draft).iterdir():
                        file.unlink()
                    _write(partial(write, optimize=False), small, given[0], written, format)
                    compare(written)
                    warn_once(f"{format}: the exporter's optimiser changes this model; exported without it")
                placed = _put(written, target)
                try:
                    difference = compare(target)
                except Exception:
                    for file in placed:
                        file.unlink(missing_ok=True)
                    raise
    except OSError as error:
        raise ValueError(
            f"--to: {str(target)!r} cannot be written: {error.strerror or one_line(error)}; name another"
        ) from error
    return target, difference


def suited(model: nn.Module, format: str, int8: bool = False) -> nn.Module:
    """The compacted model as a program of this format is made of it: for ONNX with neurons padded."""
    small = model if is_compacted(model) else compact(model, FORM.get(format, "auto"))
    if format != "onnx" or int8:  # a row of zeros has no range
        return small
    try:
        return in_form(small, "padded", ("mlp",))
    except ValueError:  # weights were replaced
        return small


def check_request(format: str, dtype: str | None, int8: bool, check: str | None) -> None:
    """ValueError, in one line, for what cannot be served here, before any work."""
    if format not in FORMATS:
        raise ValueError(f"--format: {format!r}; use one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r}; use one of {', '.join(DTYPES)}")
    if int8 and format != "onnx":
        raise ValueError(f"--int8: {format} holds none here; use --format onnx")
    if int8 and dtype is not None:
        raise ValueError(f"--int8: its other numbers are float32; leave --dtype {dtype} out")
    if check is not None and check not in CHECKS.get(format, ()):
        known = [f"{name} for {form}" for form, names in CHECKS.items() for name in names]
        raise ValueError(
            f"--check: {check!r} reads no {format} here; use {', '.join(known)}, or leave it out"
        )
    if FORMATS[format].compiler:
        need_compiler("--format", format)
    need(FORMATS[format].packages, "--format", format)
    if check is not None:
        need((check,), "--check", check)


def _write(
    write: Callable[[nn.Module, Tensor, Path], None], model: nn.Module, x: Tensor, path: Path, format: str
) -> None:
    try:
        write(model, x, path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever a tracer runs into
        raise ValueError(f"--format: {format} cannot express the model: {one_line(error)}") from error


def _expected(model: nn.Module, batches: Sequence[Tensor], format: str) -> list[Tensor]:
    with torch.no_grad():
        found = [first(model(x)) for x in batches]
    if not all(out.isfinite().all() for out in found):
        raise ValueError(f"--format: the model's own outputs are not finite; {format} cannot be checked")
    return found


def _compare(
    readers: Sequence[Callable[[Path], Program]],
    batches: Sequence[Tensor],
    expected: Sequence[Tensor],
    bound: float,
    format: str,
    path: Path,
) -> float:
    """The largest difference of what stands at `path` from what is expected; an error if it is too large."""
    dtype = str(batches[0].dtype).removeprefix("torch.")
    differences = []
    for read in readers:
        try:
            program = read(path)
            found = [first(program(x)) for x in batches]
        except (OSError, ValueError):
            raise
        except Exception as error:  # a runtime has errors of its own
            raise ValueError(
                f"--format: {format} in {dtype} cannot be run here, so it cannot be checked "
                f"({one_line(error)})" + ("" if dtype == "float32" else "; save the model in float32")
            ) from error
        for out, right in zip(found, expected, strict=True):
            scale = right.double().abs().max().clamp_min(torch.finfo(right.dtype).tiny)
            differences.append(float((out.double() - right.double()).abs().max() / scale))
    worst = max(differences, key=lambda d: (d != d, d))  # NaN is the worst
    if not worst <= bound:
        raise RuntimeError(
            f"--format: the {format} program differs from the model by {worst:.1e}, more than {bound:.0e}; "
            "nothing was kept"
        )
    return worst


def _put(written: Path, target: Path) -> list[Path]:
    """Moves what was written, with every file beside it, into place; where each file is now."""
    if written.is_dir():
        target.mkdir(exist_ok=True)
        moves = [(file, target / file.name) for file in written.iterdir()]
    else:
        beside = [file for file in written.parent.iterdir() if file != written]
        # The program last: it names the others.
        moves = [(file, target.parent / file.name) for file in (*beside, written)]
    for source, place in moves:
        os.replace(source, place)
    # Weights of an earlier program of this name that were too large for its own file.
    stale = target.with_name(target.name + ".data")
    if stale.is_file() and stale not in [place for _, place in moves]:
        stale.unlink()
    return [place for _, place in moves]

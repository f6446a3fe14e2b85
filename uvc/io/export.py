"""A compressed model for other programs: safetensors, ONNX, torch.export, each checked where it ends up."""

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from uvc.compaction import compact
from uvc.io.dtypes import check_runs, sample_images
from uvc.io.files import one_line
from uvc.io.preprocessing import preprocessing_of
from uvc.io.serialization import load, save
from uvc.layers import is_compacted

# Relative to the largest output; programs of other runtimes add up in another order.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# The program is made from the first of these batches and checked on all: the batch size stays free.
BATCHES = (2, 1, 3)


def export(folder: Path, format: str, to: Path | None = None) -> tuple[Path, float]:
    """Writes the model in `folder` in one of `FORMATS`; returns where, and the largest difference of outputs.

    A model that is not compacted is compacted on the way. The dtype stays, the batch size is free; ONNX files
    say in their metadata, and torch.export's in `preprocessing.json`, how images are prepared.

    to: the file, for safetensors the folder; by default `export` in `folder`, named after the format. What is
    written is read back, run, and compared with the model (relative to the largest output) before it is put
    in place, and again from there, with all its files; what differs is not kept. ValueError for an unknown
    format or place, a package that is missing, or a model that the format cannot express.
    """
    if format not in FORMATS:
        raise ValueError(f"--format: {format!r}; use one of {', '.join(FORMATS)}")
    name, write, read = FORMATS[format]
    target = Path(folder, "export", name) if to is None else Path(to)
    model = load(folder).eval().requires_grad_(False)
    check_runs(model)
    small = model if is_compacted(model) else compact(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as draft:
            written = Path(draft, target.name)
            with torch.no_grad():
                try:
                    write(small, sample_images(model, BATCHES[0]), written)
                except (OSError, ValueError):
                    raise
                except Exception as error:  # whatever a tracer runs into
                    raise ValueError(
                        f"--format: {format} cannot express the model: {one_line(error)}"
                    ) from error
                _compare(read, model, format, written)
                placed = _put(written, target)
                try:
                    difference = _compare(read, model, format, target)
                except Exception:
                    for file in placed:
                        file.unlink(missing_ok=True)
                    raise
    except OSError as error:
        raise ValueError(
            f"--to: {str(target)!r} cannot be written: {error.strerror or one_line(error)}; name another"
        ) from error
    return target, difference


def _compare(
    read: Callable[[Path], Callable[[Tensor], Tensor]], model: nn.Module, format: str, path: Path
) -> float:
    """The largest difference of what stands at `path` from the model; an error if it is too large."""
    x = sample_images(model, BATCHES[0])
    try:
        program = read(path)
        found = {batch: program(sample_images(model, batch)) for batch in BATCHES}
    except (OSError, ValueError):
        raise
    except Exception as error:  # a runtime has errors of its own
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"--format: {format} in {dtype} cannot be run here, so it cannot be checked ({one_line(error)})"
            + ("" if x.dtype == torch.float32 else "; save the model in float32")
        ) from error
    differences = []
    for batch, out in found.items():
        expected = model(sample_images(model, batch))
        if not expected.isfinite().all():
            raise ValueError(f"--format: the model's own outputs are not finite; {format} cannot be checked")
        scale = expected.double().abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        differences.append(float((out.double() - expected.double()).abs().max() / scale))
    worst = max(differences, key=lambda d: (d != d, d))  # NaN is the worst
    if not worst <= TOLERANCE[x.dtype]:
        raise RuntimeError(
            f"--format: the {format} program differs from the model by {worst:.1e}, more than "
            f"{TOLERANCE[x.dtype]:.0e}; nothing was kept"
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


def _write_safetensors(model: nn.Module, x: Tensor, path: Path) -> None:
    save(model, path)


def _write_torch_export(model: nn.Module, x: Tensor, path: Path) -> None:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"preprocessing.json": json.dumps(preprocessing_of(model))})


def _write_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    _need("onnx", "onnxscript", "onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        for key, value in (preprocessing_of(model) or {}).items():
            program.model.metadata_props[key] = json.dumps(value)
        # Weights of large models go to a file beside it, which it names by a relative path.
        program.save(path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors are raised
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"--format: onnx needs the package {package!r}; pip install {' '.join(packages)}"
            ) from error


# Name -> the default name in the folder, what writes a program, and what reads it back.
FORMATS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], None], Callable]] = {
    "safetensors": ("safetensors", _write_safetensors, lambda path: load(path).eval()),
    "onnx": ("model.onnx", _write_onnx, _read_onnx),
    "torch-export": ("model.pt2", _write_torch_export, lambda path: torch.export.load(path).module()),
}

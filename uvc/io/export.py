"""A compressed model for other programs: safetensors, ONNX, torch.export, each checked before it is kept."""

import importlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from uvc.io.serialization import load, save

# Relative to the largest output; float32 programs of other runtimes add up in another order.
TOLERANCE = 1e-4


def export(folder: Path, format: str, to: Path | None = None) -> tuple[Path, float]:
    """Writes the model in `folder` in one of `FORMATS`; returns where, and the largest difference of outputs.

    to: the file, for safetensors the folder; by default `export` in `folder`, named after the format. The
    batch size stays free. The written program is read back, run, and compared with the model (relative to the
    largest output); what differs is not kept. ValueError for an unknown format or place, or a package that is
    missing.
    """
    if format not in FORMATS:
        raise ValueError(f"--format: {format!r}; use one of {', '.join(FORMATS)}")
    write, name = FORMATS[format]
    target = Path(folder, "export", name) if to is None else Path(to)
    model = load(folder).eval()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as draft:
            written = Path(draft, target.name)
            size = model.patch_embed.img_size
            x = torch.linspace(-2, 2, 2 * model.in_chans * size[0] * size[1]).view(2, model.in_chans, *size)
            with torch.no_grad():
                expected = model(x)
                found = write(model, x, written)
            difference = float((found - expected).abs().max() / expected.abs().max())
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"--format: the {format} program differs from the model by {difference:.1e}, more than "
                    f"{TOLERANCE:.0e}; nothing was kept"
                )
            _put(written, target)
    except OSError as error:
        raise ValueError(
            f"--to: {str(target)!r} cannot be written: {error.strerror}; name another"
        ) from error
    return target, difference


def _put(written: Path, target: Path) -> None:
    if not written.is_dir():
        os.replace(written, target)
        return
    target.mkdir(exist_ok=True)
    for file in written.iterdir():
        os.replace(file, target / file.name)


def _safetensors(model: nn.Module, x: Tensor, path: Path) -> Tensor:
    save(model, path)
    return load(path).eval()(x)


def _torch_export(model: nn.Module, x: Tensor, path: Path) -> Tensor:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()(x)


def _onnx(model: nn.Module, x: Tensor, path: Path) -> Tensor:
    _need("onnx", "onnxscript", "onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        program.save(path)
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"--format: onnx needs the package {package!r}; pip install {' '.join(packages)}"
            ) from error


# Name -> what writes and reads it back, and the default name in the folder.
FORMATS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], Tensor], str]] = {
    "safetensors": (_safetensors, "safetensors"),
    "onnx": (_onnx, "model.onnx"),
    "torch-export": (_torch_export, "model.pt2"),
}

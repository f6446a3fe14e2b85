"""`uvc export`: a program for another runtime, its size, its time beside the dense model's, int8's top-1."""

import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn
from uvc_kernels.timing import milliseconds, take_turns

from uvc.app.evaluating import data_of
from uvc.app.run_dir import OPTIONS
from uvc.compaction import compact
from uvc.environment import choose_device
from uvc.io.dtypes import input_dtype
from uvc.io.export import check_request, export
from uvc.io.runtimes import FORMATS, Program
from uvc.io.serialization import describe, fill_buffers, load, load_shapes, rebuild_dense
from uvc.layers import image_of
from uvc.training.data import Data

CALIBRATION, BATCH = 256, 32  # images that give ranges to 8-bit numbers, in batches
JUDGED = 2000  # validation images on which 8-bit numbers are compared with the model
REST = 0.05  # seconds


def export_run(
    folder: Path,
    format: str,
    to: Path | None = None,
    *,
    int8: bool = False,
    dtype: str | None = None,
    check: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    time: bool = False,
    batch_size: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Export the model in a folder and return figures: file, difference, bytes; top-1 and times if asked for.

    int8: with ranges from training images of the folder's run, or of `data`. time: beside the dense model of
    the same architecture in the same runtime, in float32, on the CPU. ValueError, one line, before any work
    for what cannot be served.
    """
    check_request(format, dtype, int8, check)
    if int8 and data is None and not (folder / OPTIONS).is_file():
        raise ValueError(f"--int8: {str(folder)!r} does not say on which data to calibrate; give --data")
    choose_device("cpu", threads)
    opened, images = None, None
    if int8:
        # With the same threads as every export, not the run's own.
        threads = torch.get_num_threads()
        opened, _, _ = data_of(folder, load_shapes(folder), data, data_root, threads=threads)
        images = calibration(opened)
    target, difference = export(folder, format, to, dtype=dtype, calibration=images, check=check)
    figures = {
        "file": str(target), "format": format, "int8": int8, "dtype": dtype, "check": check,
        "difference": difference, "bytes": size_of(target),
    }  # fmt: skip
    read = FORMATS[format].read
    if opened is not None:
        model = load(folder)
        with torch.inference_mode():
            figures["top1"], figures["images"] = top1(read(target), opened.val)
            figures["float32_top1"], _ = top1(model, opened.val)
    if time:
        figures |= times(folder, format, target, batch_size, dtype, int8)
    return figures


def calibration(data: Data) -> list[Tensor]:
    """Training images, in batches."""
    found: list[Tensor] = []
    for images, *_ in data.train:
        found += images.split(BATCH)
        if sum(map(len, found)) >= CALIBRATION:
            break
    return found


def size_of(path: Path) -> int:
    """Bytes of a file with what lies beside it under its name, or of a folder."""
    files = path.iterdir() if path.is_dir() else path.parent.glob(path.name + "*")
    return sum(file.stat().st_size for file in files)


def top1(program: Program, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Percent right of the first images, and how many those are."""
    right = count = 0
    for images, labels in batches:
        right += int((program(images).argmax(-1) == labels).sum())
        count += len(labels)
        if count >= JUDGED:
            break
    return 100.0 * right / count, count


def times(
    folder: Path, format: str, target: Path, batch: int, dtype: str | None, int8: bool = False
) -> dict[str, Any]:
    """Milliseconds of the program, of the same model in float32 where it is not, and of the dense model."""
    model = load(folder)
    images = torch.randn(batch, *image_of(model))
    _, write, read, *_ = FORMATS[format]
    given = images.to(input_dtype(model) if dtype is None else getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as draft:
        dense = Path(draft, target.name)
        with torch.no_grad():
            write(dense_like(model), torch.randn(2, *images.shape[1:]), dense)
        size = size_of(dense)
        programs = {"dense": (read(dense), images), "this": (read(target), given)}
        if int8 or dtype not in (None, "float32"):
            plain = export(folder, format, Path(draft, f"float32-{target.name}"), dtype="float32")[0]
            programs["float32"] = (read(plain), images)
        timers = {name: partial(second_pass, *program) for name, program in programs.items()}
        with torch.inference_mode():
            samples = take_turns(timers, 30, 3, 8.0)
    ms = {name: median(samples[name]) for name in samples}
    found = {
        "batch": batch, "threads": torch.get_num_threads(), "ms": ms["this"], "dense_ms": ms["dense"],
        "ratio": ratio(samples["this"], samples["dense"]), "dense_bytes": size,
    }  # fmt: skip
    if "float32" in samples:
        of = ratio(samples["this"], samples["float32"])
        found |= {"float32_ms": ms["float32"], "float32_ratio": of, "instructions": instructions()}
    return found


def second_pass(program: Program, x: Tensor) -> float:
    """Milliseconds of the second of two passes, after a rest: threads of the program before spin a while."""
    if torch.get_num_threads() > 1:
        sleep(REST)
    program(x)
    return milliseconds(lambda: program(x), torch.device("cpu"))


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> float:
    """The median over turns."""
    return median(a / b for a, b in zip(parts, wholes, strict=True))


def instructions() -> str:
    """Products of 8-bit numbers that this processor has, as Linux names them; "" where it tells none."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ""
    return ", ".join(n for n in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if n in flags)


def dense_like(model: nn.Module) -> nn.Module:
    """The dense model that `model` was pruned from, with small random weights in float32."""
    config = describe(model)
    dense = rebuild_dense(config, len(config["structure"]["blocks"]))
    weights = {
        name: (0.02 * torch.randn(tensor.shape)).to(tensor.dtype)
        for name, tensor in dense.state_dict().items()
    }
    dense.load_state_dict(weights, assign=True)
    fill_buffers(dense, "cpu")
    return compact(dense).eval().requires_grad_(False)


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for a reader."""
    found = [f"{figures['file']}  (outputs differ by {figures['difference']:.0e} of the largest)"]
    size = f"size: {figures['bytes'] / 1e6:.2f} MB"
    if "dense_bytes" in figures:
        size += f", {figures['bytes'] / figures['dense_bytes']:.3f} of the dense model's"
    found.append(size)
    if "top1" in figures:
        says = f"top-1 {figures['top1']:.2f} %, in float32 {figures['float32_top1']:.2f} %"
        found.append(f"{says}, of {figures['images']} images")
    if "ms" in figures:
        place = f"batch {figures['batch']}, {figures['threads']} threads"
        says = f"{figures['ms']:.2f} ms, dense {figures['dense_ms']:.2f} ms"
        found.append(f"{place}: {says}, {figures['ratio']:.3f} of its time")
    if "float32_ms" in figures:
        says = f"beside it in float32 {figures['float32_ms']:.2f} ms, {figures['float32_ratio']:.3f} of that"
        known = figures["instructions"] or "no products of 8-bit numbers"
        found.append(f"{says}; this processor has {known}")
    return found

"""Compiles csrc/cuda without a GPU; the rows are part of the table of `compile_check`.

A row per kernel and target: registers, bytes spilled, static shared memory (what a launch adds is bounded in
the sources), and the tensor-core instruction in its machine code, or in its PTX where nothing disassembles.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .report import Row

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
# What nvcc compiles, and the kernels in it.
UNITS = {
    "small.cu": ("gather", "activate", "activate_backward", "sums", "scores", "shrink", "turn"),
    "attention.cu": ("forward",),
    "attention_backward.cu": ("whole", "stream"),
    "bias_gradient.cu": ("bias_gradient",),
}
TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
SHARED = 48 * 1024  # bytes of static shared memory that a block may have on any target
_TYPES = {"4Bf16": "bf16", "4Fp16": "fp16", "f": "fp32", "d": "fp64"}


def missing() -> str | None:
    """None when the sources and nvcc are found, else what is missing."""
    if not (SOURCES / "cuda").is_dir():
        return "the sources of the extension are not installed"
    return None if _nvcc() else "no nvcc was found"


def rows(targets: Sequence[str] = TARGETS, match: Sequence[str] = ()) -> Iterator[Row]:
    """Compiles the units; yields the rows whose 'kernel configuration' begins with one of the texts `match`.

    What no text can mean is not compiled: every kernel is named cuda.something. RuntimeError without nvcc or
    sources.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(f"compile_check: {reason}")
    for unit, kernels in UNITS.items():
        if match and not any(text.startswith(f"cuda.{kernel}") for text in match for kernel in kernels):
            continue
        for target in targets:
            for row in _compile(unit, target):
                if not match or f"{row.kernel} {row.configuration}".startswith(tuple(match)):
                    yield row


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _disassembler() -> str | None:
    # The CUDA toolkit has one, and Triton brings one.
    found = importlib.util.find_spec("triton")
    folders = (
        [str(Path(place, "backends/nvidia/bin")) for place in found.submodule_search_locations]
        if found
        else []
    )
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def machine_code(unit: str, target: str) -> tuple[str, dict[str, str]]:
    """What the compiler says of one of `UNITS` for a target, and every kernel's code by its mangled name.

    Machine code, or PTX where nothing disassembles. RuntimeError with the compiler's first error.
    """
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "unit.cubin")
        command = [_nvcc(), "-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas=-v"]
        command += [f"-I{path}" for path in (SOURCES, *include_paths())]
        command += [f"-gencode=arch={target.replace('sm', 'compute')},code={target}"]
        command += ["-cubin", "--keep", "--keep-dir", folder, str(SOURCES / "cuda" / unit), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            errors = (line for line in done.stderr.splitlines() if "error" in line)
            raise RuntimeError(next(errors, "nvcc failed"))
        if (tool := _disassembler()) is not None:
            code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
            parts = code.split("Function : ")
        else:
            parts = next(Path(folder).glob("*.ptx")).read_text().split(".entry ")
        return done.stderr, {re.match(r"\w+", part)[0]: part for part in parts[1:]}


def reported(report: str) -> list[tuple[str, str]]:
    """The mangled name of every kernel, and what the compiler says of it."""
    return re.findall(r"Compiling entry function '(\w+)'(.*?Used .*?)\n", report, re.DOTALL)


def _compile(unit: str, target: str) -> list[Row]:
    try:
        report, codes = machine_code(unit, target)
    except RuntimeError as error:
        return [Row(f"cuda.{unit}", "", target, None, None, 0, "", str(error))]
    return [_row(name, said, target, codes.get(name, "")) for name, said in reported(report)]


def _row(name: str, report: str, target: str, code: str) -> Row:
    kernel, configuration = readable(name)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
    shared = sum(int(size) for size in re.findall(r"(\d+) bytes smem", report))
    instruction = next((found for found in ("HMMA", "mma.sync") if found in code), "")
    multiplies = kernel in ("forward", "whole", "stream", "bias_gradient")
    multiplies = multiplies and not configuration.startswith("fp32")
    faults = [
        spilled and f"spills {spilled} bytes",
        shared > SHARED and f"wants {shared} bytes shared",
        multiplies and not instruction and "no HMMA",
    ]
    fault = ", ".join(fault for fault in faults if fault)
    return Row(f"cuda.{kernel}", configuration, target, registers, spilled, shared, instruction, fault)


def loops_that_multiply(code: str) -> list[list[str]]:
    """The instructions of every innermost loop of machine code that has tensor-core instructions in it."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    jumps = [(at, re.search(r"\bBRA.*?(0x[0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    bodies = [[text for at, text in lines if a <= at <= b] for a, b in inner]
    return [body for body in bodies if any("HMMA" in text for text in body)]


def readable(name: str) -> tuple[str, str]:
    """Kernel and template arguments of a mangled name."""
    kernel, arguments = re.search(r"\d([a-z_]+)_kernelI(.*?)EEv", name).groups()
    types = [_TYPES[found] for found in re.findall("|".join(_TYPES), arguments)]
    width, biased = re.search(r"Li(\d+)", arguments), "Lb1" in arguments
    return kernel, " to ".join(types) + (f" width {width[1]}" if width else "") + " bias" * biased

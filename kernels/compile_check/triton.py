"""Compiles every Triton kernel in every configuration a launcher can choose, without a GPU."""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from uvc_kernels.compile_check.report import Row

MODULES = (
    "gather",
    "attention_core",
    "attention_whole",
    "activation",
    "column_sums",
    "group_scores",
    "prox_shrink",
    "turn",
    "bias_gradient",
)


class Target(NamedTuple):
    """A GPU: how Triton names it, its shared memory per block in bytes, its tensor-core instruction."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    instruction: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, "wgmma"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, "tcgen05"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, "mfma"),
}
# Bytes that a kernel may spill, by version of Triton: what its worst one does there. Under others none does.
SPILLS = {"3.6": 8}
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma",
}


def rows(targets: Sequence[str] = tuple(TARGETS), match: Sequence[str] = ()) -> Iterator[Row]:
    """Compiles, one by one, what has one of the texts `match` in 'kernel configuration'; all without any.

    RuntimeError under TRITON_INTERPRET=1, where there is nothing to compile.
    """
    for module in MODULES:
        module = importlib.import_module(f"uvc_kernels.triton.{module}")
        for case in module.cases():
            if not hasattr(case.kernel, "arg_names") or type(case.kernel).__name__ != "JITFunction":
                raise RuntimeError("compile_check: unset TRITON_INTERPRET, it replaces the compiler")
            kernel = f"{module.__name__.rpartition('.')[2]}.{case.kernel.__name__.strip('_')}"
            if not match or any(text in f"{kernel} {case.label}" for text in match):
                for name in targets:
                    if not case.targets or name in case.targets:
                        yield _row(kernel, case, name)


def _row(kernel: str, case, name: str) -> Row:
    target = TARGETS[name]
    try:
        compiled = _compile(case, target)
    except Exception as error:  # the compiler may raise anything
        fault = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        return Row(kernel, case.label, name, None, None, 0, "", fault)
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spilled = _resources(text)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
    found = next((short for short, long in INSTRUCTIONS.items() if long in text), "")
    faults = [
        spilled and spilled > _may_spill() and f"spills {spilled} bytes",
        compiled.metadata.shared > target.shared and f"wants {compiled.metadata.shared} bytes shared",
        case.tensor_cores and found != target.instruction and f"no {target.instruction}",
        case.tensor_cores and "ld.global.b16" in text and "loads 2 bytes at a time",
    ]
    fault = ", ".join(fault for fault in faults if fault)
    return Row(kernel, case.label, name, registers, spilled, compiled.metadata.shared, found, fault)


def _may_spill() -> int:
    import triton

    return SPILLS.get(".".join(triton.__version__.split(".")[:2]), 0)


def _compile(case, target: Target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # What a launch knows: torch aligns its allocations to at least 16 bytes.
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    device = GPUTarget(target.backend, target.arch, target.warp)
    return triton.compile(source, target=device, options=(case.options or {}).get(target.backend == "hip"))


def _resources(ptx: str) -> tuple[int | None, int | None]:
    """Registers per thread and bytes spilled, as an assembler in Triton reports them; None without one."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        # Triton brings two, and the older one does not know every version of PTX.
        for tool in ("ptxas-blackwell", "ptxas"):
            if not (tools / tool).exists():
                continue
            command = [tools / tool, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            registers = re.search(r"Used (\d+) registers", done.stderr)
            stores = re.search(r"(\d+) bytes spill stores", done.stderr)
            if registers and stores:
                return int(registers[1]), int(stores[1])
    return None, None

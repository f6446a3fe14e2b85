"""The compile gate: kernels compile for GPUs that are not here, without spills, on tensor cores."""

import os
import subprocess
import sys

import pytest
from uvc_kernels.compile_check import triton as gate

pytest.importorskip("triton", reason="Triton is not installed")
# One configuration of every kernel: what a bf16 ViT of 197 tokens and heads of 64 dims runs.
USUAL = ("whole.forward bf16 width 64 tokens 208", "whole.backward bf16 width 64 tokens 256")
LONG = ("core.forward bf16 width 64 tail 16", "core.backward bf16 width 64 tail 16")
SMALL = (
    "gather.gather bf16 to bf16",
    "activation.forward bf16 gelu",
    "activation.backward bf16 gelu",
    "scores bf16",
    "shrink bf16",
    "turn bf16 by fp32 width 64",
    "bias_gradient bf16 width 64",
)


def run_command(*arguments):
    """The rows that the command prints, and its exit code, in a process of its own that has a compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "uvc_kernels.compile_check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()[1:-1], done.returncode


@pytest.mark.parametrize("target", gate.TARGETS)
def test_the_usual_kernels_compile_for(target):
    rows, code = run_command("--target", target, *(f"--match={text}" for text in (*USUAL, *LONG, *SMALL)))
    assert len(rows) >= 10 and code == 0, "\n".join(rows)
    attention = [row for row in rows if "attention" in row]
    assert len(attention) >= 3
    assert all(gate.TARGETS[target].instruction in row for row in attention)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("target", gate.TARGETS)
def test_every_configuration_compiles_for(target):
    rows, code = run_command("--target", target)
    assert len(rows) > 80 and code == 0, "\n".join(rows)


def test_the_gate_sees_a_kernel_that_does_not_compile(monkeypatch):
    def fail(case, target):
        raise RuntimeError("first line\nout of registers")

    case = type("Case", (), {"label": "bf16"})
    monkeypatch.setattr(gate, "_compile", fail)
    row = gate._row("activation.forward", case, "sm_90")
    assert row.fault == "RuntimeError: out of registers"


@pytest.mark.parametrize(
    ("registers", "spilled", "shared", "ptx", "fault"),
    [
        (255, 20, 100, "wgmma.mma_async", "spills 20 bytes"),
        (255, 0, 300_000, "wgmma.mma_async", "wants 300000 bytes shared"),
        (255, 0, 100, "mma.sync", "no wgmma"),
        (255, 0, 100, "ld.global.b16 wgmma.mma_async", "loads 2 bytes at a time"),
        (255, 0, 100, "wgmma.mma_async", ""),
        (80, 4, 100, "wgmma.mma_async", "spills 4 bytes"),
    ],
)
def test_the_gate_names_what_is_wrong(monkeypatch, registers, spilled, shared, ptx, fault):
    case = type("Case", (), {"label": "bf16", "tensor_cores": True})
    metadata = type("Metadata", (), {"shared": shared})
    compiled = type("Compiled", (), {"asm": {"ptx": ptx, "cubin": b""}, "metadata": metadata})
    monkeypatch.setattr(gate, "_compile", lambda case, target: compiled)
    monkeypatch.setattr(gate, "SPILLS", {})
    monkeypatch.setattr(gate, "_resources", lambda ptx: (registers, spilled))
    assert gate._row("attention_core.forward", case, "sm_90").fault == fault


def test_under_the_interpreter_the_gate_says_that_there_is_no_compiler():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "uvc_kernels.compile_check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.strip().startswith("compile_check: unset TRITON_INTERPRET")

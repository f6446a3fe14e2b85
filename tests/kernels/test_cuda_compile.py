"""The compile gate of csrc/cuda: it compiles for GPUs that are not here, on tensor cores, without spills."""

import pytest
from uvc_kernels.compile_check import cuda

REPORT = """ for 'sm_90'
ptxas info    : Function properties for x
    0 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, {shared} bytes smem
"""
NAME = "_ZN3uvc3gpu45_GLOBAL__N__4f_9_attention_cu14forward_kernelINS0_4Bf16ELi64EEEvNS0_4CallIT_EEiii"
needs_nvcc = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


@needs_nvcc
@pytest.mark.timeout(600)
def test_attention_forward_compiles_for_sm_90a():
    rows = list(cuda.rows(["sm_90a"], ["cuda.forward"]))
    assert {row.configuration for row in rows} == {
        f"{name} width {width}{bias}"
        for name, widths in (("bf16", (32, 64, 128)), ("fp16", (32, 64, 128)), ("fp32", (64, 128)))
        for width in widths
        for bias in ("", " bias")
    }
    assert not [row for row in rows if row.fault]
    # more registers, and three blocks no longer share a multiprocessor
    assert all(row.registers <= 168 for row in rows if "fp32" not in row.configuration)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", cuda.TARGETS)
def test_every_kernel_compiles_for(target):
    rows = list(cuda.rows([target]))
    assert {row.kernel for row in rows} == {f"cuda.{name}" for unit in cuda.UNITS.values() for name in unit}
    assert len(rows) >= 40 and not [row for row in rows if row.fault]


@pytest.mark.parametrize(
    ("spilled", "shared", "code", "fault"),
    [
        (0, 0, "HMMA", ""),
        (4, 0, "HMMA", "spills 4 bytes"),
        (0, 60_000, "mma.sync", "wants 60000 bytes shared"),
        (0, 0, "FFMA", "no HMMA"),
    ],
    ids=["clean", "spills", "shared memory", "no tensor cores"],
)
def test_the_gate_names_what_is_wrong(spilled, shared, code, fault):
    row = cuda._row(NAME, REPORT.format(spilled=spilled, shared=shared), "sm_90a", code)
    assert (row.kernel, row.configuration, row.registers) == ("cuda.forward", "bf16 width 64", 128)
    assert row.fault == fault


def test_a_kernel_with_a_bias_has_a_name_of_its_own():
    biased = NAME.replace("ELi64EEEv", "ELi64ELb1EEEv")
    assert cuda.readable(biased) == ("forward", "bf16 width 64 bias")
    assert cuda.readable(NAME.replace("ELi64EEEv", "ELi64ELb0EEEv")) == ("forward", "bf16 width 64")


def test_without_nvcc_the_gate_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="no nvcc was found"):
        list(cuda.rows())

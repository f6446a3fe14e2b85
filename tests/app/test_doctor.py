"""What `uvc doctor` says of the machine: the kernels' instruction set and the rate of matrix products."""

import io
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from uvc_kernels import _dispatch

import uvc.cli as cli
from uvc.app import doctor

built = pytest.mark.skipif(_dispatch.extension_error is not None, reason="the extension is not built")
ASK = "from uvc_kernels import _dispatch; print(_dispatch.instruction_set())"


def shown(table) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def instruction_set(**environment: str) -> str:
    environment = {**{k: v for k, v in os.environ.items() if k != "UVC_CPU_ISA"}, **environment}
    return subprocess.check_output([sys.executable, "-c", ASK], env=environment, text=True).strip()


@built
def test_the_instruction_set_is_the_best_that_is_not_above_the_one_asked_for():
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    best = instruction_set()
    assert instruction_set(UVC_CPU_ISA="baseline") == "baseline"
    assert instruction_set(UVC_CPU_ISA="avx2") == min("avx2", best, key=order.index)


def test_the_instruction_set_and_what_lowers_it_are_shown(monkeypatch):
    monkeypatch.setenv("UVC_CPU_ISA", "avx2")
    monkeypatch.setattr(_dispatch, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(_dispatch, "own_products", lambda: False)
    assert re.search(r"CPU kernels\W+avx2, UVC_CPU_ISA=avx2\W", shown(doctor._machine()))


def test_whose_products_the_kernels_run_is_shown(monkeypatch):
    monkeypatch.delenv("UVC_CPU_ISA", raising=False)
    monkeypatch.setenv("UVC_CPU_PRODUCTS", "own")
    monkeypatch.setattr(_dispatch, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(_dispatch, "own_products", lambda: True)
    kernels = doctor.machine()["CPU kernels"]
    assert kernels == "avx512, own products of float32, UVC_CPU_PRODUCTS=own"


def test_a_build_without_kernels_is_shown(monkeypatch):
    monkeypatch.delenv("UVC_CPU_ISA", raising=False)
    monkeypatch.setattr(_dispatch, "extension_error", "no compiler")
    assert _dispatch.instruction_set() is None
    assert re.search(r"CPU kernels\W+not built\W", shown(doctor._machine()))


def test_whatever_a_kernel_raises_is_shown_and_the_others_are_checked(monkeypatch):
    def errors(op, provider, device, dtype):
        if provider == "cpu":
            raise ValueError("no such instruction")
        return 0.0, 0.5

    monkeypatch.setattr(doctor.self_check, "errors", errors)
    found = {row["provider"]: (row["verdict"], row["note"]) for row in doctor.checks()}
    assert found["cpu"] == ("FAILED", "no such instruction") and found["cuda"] == ("ok", "")


def test_products_are_timed_on_one_thread_and_on_all_and_threads_come_back(monkeypatch):
    seen = []

    def rate(dtype):
        seen.append((torch.get_num_threads(), dtype))
        return 100.0 * len(seen)

    monkeypatch.setattr(doctor, "rate", rate)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    threads = torch.get_num_threads()
    rows = [re.findall(r"\d+", line) for line in shown(doctor._products()).splitlines() if "│" in line]
    assert rows == [["1", "100", "200"], ["3", "300", "400"]]
    assert seen == [(n, dtype) for n in (1, 3) for dtype in (torch.float32, torch.bfloat16)]
    assert torch.get_num_threads() == threads


def test_a_rate_is_that_of_the_fastest_product_after_the_first(monkeypatch):
    times = iter([5.0, 2.0, 4.0])
    monkeypatch.setattr(doctor, "milliseconds", lambda call, device: call() is None or next(times))
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    assert doctor.rate(torch.float32) == pytest.approx(2 * 512**3 / 2e6)


def test_doctor_tells_versions_products_and_backends_in_time(capsys):
    start = time.monotonic()
    shown(doctor._products())
    took = time.monotonic() - start
    assert cli.run(["doctor"]) == 0
    said = capsys.readouterr().out
    words = (torch.__version__.split("+")[0], "attention", "reference", "bfloat16", "GFLOP/s", "CPU kernels")
    assert all(word in said for word in words)
    assert took < 10  # 0.8 seconds where nothing else runs

"""Which provider serves, what forcing one does, and that no slow path is silent."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import uvc_kernels
from uvc_kernels import _dispatch

CPU = torch.device("cpu")
OPS = ("attention", "mlp", "group_scores", "prox_shrink")


@pytest.mark.parametrize("op", OPS)
def test_the_cpu_kernels_serve_float_tensors_on_the_cpu(op, monkeypatch):
    monkeypatch.delenv("UVC_BACKEND", raising=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert uvc_kernels.select(op, CPU, dtype) == "cpu"


def test_the_environment_variable_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv("UVC_BACKEND", "reference")
    assert uvc_kernels.select("mlp", CPU, torch.float32) == "reference"
    monkeypatch.setenv("UVC_BACKEND", "cpu")
    assert uvc_kernels.select("mlp", CPU, torch.float32) == "cpu"


def test_the_with_block_wins_nests_and_ends_after_an_error(monkeypatch):
    monkeypatch.setenv("UVC_BACKEND", "cpu")
    with uvc_kernels.backend("reference"):
        assert uvc_kernels.select("mlp", CPU, torch.float32) == "reference"
        with pytest.raises(KeyError), uvc_kernels.backend("cpu"):
            raise KeyError
        assert uvc_kernels.select("mlp", CPU, torch.float32) == "reference"
    assert uvc_kernels.select("mlp", CPU, torch.float32) == "cpu"


@pytest.mark.parametrize("how", ["with", "environment"])
def test_an_unknown_backend_is_one_line_that_lists_the_names(how, monkeypatch):
    with pytest.raises(
        ValueError, match="'gpu'; use one of reference, cpu, triton, cuda, cuda-host"
    ) as caught:
        if how == "with":
            with uvc_kernels.backend("gpu"):
                pass
        else:
            monkeypatch.setenv("UVC_BACKEND", "gpu")
            uvc_kernels.select("mlp", CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "reason"),
    [
        ("cpu", "cpu", torch.complex64, "not torch.complex64"),
        ("cpu", "meta", torch.float32, "not on meta"),
    ],
)
def test_a_forced_backend_that_cannot_serve_says_why(name, device, dtype, reason):
    with uvc_kernels.backend(name), pytest.raises(RuntimeError, match=f"cannot run it: .*{reason}"):
        uvc_kernels.select("attention", torch.device(device), dtype)


def test_a_dtype_without_kernel_runs_on_plain_torch_and_says_so_once(monkeypatch):
    monkeypatch.delenv("UVC_BACKEND", raising=False)
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    a = torch.randn(2, 3, dtype=torch.complex64)
    with pytest.warns(
        RuntimeWarning, match="uvc_kernels.group_scores runs on plain PyTorch for torch.complex"
    ):
        scores = uvc_kernels.group_scores([a], [a], [0])
    torch.testing.assert_close(scores, (a * a).sum(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uvc_kernels.group_scores([a], [a], [0])


def test_a_missing_extension_is_said_once_and_everything_still_runs(monkeypatch):
    monkeypatch.delenv("UVC_BACKEND", raising=False)
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    monkeypatch.setattr(_dispatch, "extension_error", "No module named 'uvc_kernels._C'")
    with pytest.warns(RuntimeWarning, match="not built .*reinstall with a C\\+\\+ compiler"):
        scores = uvc_kernels.group_scores([torch.ones(2, 3)], [torch.ones(2, 3)], [0])
    assert scores.tolist() == [3, 3]
    with uvc_kernels.backend("cpu"), pytest.raises(RuntimeError, match="not built"):
        uvc_kernels.group_scores([torch.ones(2, 3)], [torch.ones(2, 3)], [0])


ISA_CHECK = """
import torch, uvc_kernels
torch.manual_seed(0)
kept = uvc_kernels.kept_heads(torch.rand(3, 11) < 0.6, torch.rand(3, 11) < 0.6)
for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
    results = []
    for name in ("reference", "cpu"):
        torch.manual_seed(1)
        leaves = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_()
                  for s in ((2, 77, 24), (99, 24), (99,), (24, 33), (24,), (50, 24), (24, 50))]
        with uvc_kernels.backend(name):
            y = uvc_kernels.attention(*leaves[:5], kept, 0.2)
            neurons = uvc_kernels.kept_neurons(torch.arange(50) % 3 == 0)
            y = uvc_kernels.mlp(y, leaves[5], None, leaves[6], None, neurons)
            scores = uvc_kernels.group_scores([leaves[1], leaves[3]], [leaves[1], leaves[3]], [0, 1])
        results.append([y, scores, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results):
        assert (a - b).norm() <= limit * a.norm(), (dtype, a.shape, (a - b).norm() / a.norm())
print("right")
"""


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_the_loops_of_older_processors_are_right_too(isa):
    environment = {**os.environ, "UVC_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ISA_CHECK], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr

"""Products of large float32 matrices, ours and the vendor's, through the ops that make them."""

import os
import subprocess
import sys

import pytest
from uvc_kernels import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.extension_error is not None, reason="the extension is not built")

# Every product of an MLP has tokens, width and kept neurons for its three sizes, each transposed somewhere:
# sizes around a tile of 8 rows and 48 columns, a register, and the longest chains of 192 and 384 terms. All
# numbers are positive and ReLU is the activation, so that no entry is a small difference of large ones.
CHECK = """
import itertools, sys
import torch
import uvc_kernels
ops = torch.ops.uvc_kernels
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
sizes = [*itertools.product((1, 8, 65, 197), (7, 64, 193), (0, 1, 49, 129, 251))]
sizes += (577, 48, 384), (40, 400, 30)
for tokens, width, kept in sizes:
    neurons = torch.randperm(kept + 5)[:kept].sort().values
    shapes = (tokens, width), (kept + 5, width), (kept + 5,), (width, kept + 5), (width,), (tokens, width)
    results = []
    drawn = [torch.rand(shape) for shape in shapes]
    for dtype in (torch.float32, torch.float64):
        x, w1, b1, w2, b2, grad = (t.to(dtype) for t in drawn)
        y, hidden = ops.mlp(x, w1, b1, w2, b2, None, None, neurons, 2)
        back = ops.mlp_backward(grad, x, w1, b1, w2, None, None, neurons, 2, hidden, 31)
        results.append([y, *back[:5]])
    for name, found, right in zip(("y", "x", "w1", "b1", "w2", "b2"), *results):
        error = ((found - right).abs() / right.abs().clamp_min(1e-30)).max()
        assert error <= 2e-6, (tokens, width, kept, name, float(error))
print("right")
"""
CHOICE = "from uvc_kernels import _dispatch; print(_dispatch.own_products(), _dispatch.instruction_set())"


def run(script: str, *arguments: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr[-500:]


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("isa", ["best", "avx2", "baseline"])
def test_our_products_are_right(isa, threads):
    assert run(CHECK, threads, UVC_CPU_ISA=isa, UVC_CPU_PRODUCTS="own") == "right"


def test_the_vendors_products_are_right():
    assert run(CHECK, "1", UVC_CPU_PRODUCTS="vendor") == "right"


def test_the_environment_chooses_and_old_instruction_sets_have_the_vendors():
    assert run(CHOICE, UVC_CPU_PRODUCTS="own", UVC_CPU_ISA="avx2").startswith("True")
    assert run(CHOICE, UVC_CPU_PRODUCTS="vendor").startswith("False")
    assert run(CHOICE, UVC_CPU_PRODUCTS="", UVC_CPU_ISA="avx2").startswith("False")

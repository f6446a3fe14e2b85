"""The cpu kernels' sums, and that every instruction set that the loops are built for is exact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import uvc_kernels

ops = torch.ops.uvc_kernels
HERE = Path(__file__).parent
SETS = ("baseline", "avx2")


def bias_gradients(dtype):
    """Those of attention's and an MLP's biases over 4616 tokens, where every term is positive."""
    every = torch.ones(1, 8, dtype=torch.bool)
    kept = uvc_kernels.kept_heads(every, every)
    grad, x = torch.rand(8, 577, 8).to(dtype), torch.zeros(8, 577, 8, dtype=dtype)
    weight, bias, eye = (
        torch.zeros(24, 8, dtype=dtype),
        torch.zeros(24, dtype=dtype),
        torch.eye(8, dtype=dtype),
    )
    saved = ops.attention(x, weight, bias, eye, None, *kept[1:5], 1.0)
    attention = ops.attention_backward(grad, x, weight, bias, eye, *kept[1:5], 1.0, *saved[1:], 31)
    neurons = torch.arange(8)
    hidden = ops.mlp(x, eye, None, eye, None, None, None, neurons, 0)[1]
    mlp = ops.mlp_backward(grad, x, eye, None, eye, None, None, neurons, 0, hidden, 31)
    return {
        "qkv_bias": attention[2][16:],
        "proj_bias": attention[4],
        "fc1_bias": mlp[2],
        "fc2_bias": mlp[4],
    }


def test_sums_over_many_tokens_are_made_in_blocks():
    """One chain per lane loses up to 1e-5 here, blocks a few ulps."""
    torch.manual_seed(0)
    narrow = bias_gradients(torch.float32)
    torch.manual_seed(0)
    wide = bias_gradients(torch.float64)
    for name, found in narrow.items():
        assert (found / wide[name] - 1).abs().max() < 5e-7, name


def run_under(isa, *arguments):
    environment = {**os.environ, "UVC_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("isa", SETS)
def test_attention_and_sums_are_exact_under(isa):
    cases = "sums or (ragged and 197 and float32) or (exact and halves and 33 and float32)"
    run_under(
        isa,
        "-k",
        cases,
        "test_attention.py",
        "test_attention_with_positions.py",
        "test_instruction_sets.py::test_sums_over_many_tokens_are_made_in_blocks",
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("isa", SETS)
def test_the_whole_kernel_suite_passes_under(isa):
    run_under(isa, "-m", "not slow", "--deselect", "test_instruction_sets.py", ".")

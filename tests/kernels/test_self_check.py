"""What a GPU kernel must pass before it serves: at real sizes, with one verdict for every caller."""

import pytest
import torch
import uvc_kernels
from torch.utils.checkpoint import checkpoint
from uvc_kernels import _dispatch, self_check

CPU = torch.device("cpu")
# Stands for a GPU's kernels: the sources of csrc/cuda, built for the CPU.
HOST = "cuda-host"
pytestmark = pytest.mark.skipif(_dispatch.extension_error is not None, reason="the extension is not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", self_check.EXAMPLES)
def test_every_op_of_the_cuda_sources_passes(op, dtype):
    assert self_check.fault(op, HOST, CPU, dtype) is None


CALLERS = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("op", ["mlp", "gather", "prox_shrink"])
def test_the_verdict_does_not_depend_on_the_mode_of_the_first_call(op, caller, monkeypatch):
    monkeypatch.setattr(_dispatch, "_proofs", {})
    with CALLERS[caller]():
        assert _dispatch._proven(op, HOST, CPU, torch.float32)


def test_a_check_under_gradient_checkpointing_is_no_part_of_what_that_computes_again(monkeypatch):
    monkeypatch.setattr(_dispatch, "_proofs", {})
    x = torch.randn(5, requires_grad=True)

    def run(x):
        assert _dispatch._proven("mlp", HOST, CPU, torch.float32)  # at the first call alone
        return x.exp().sin()

    checkpoint(run, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, x.exp().cos() * x.exp())


def test_attention_is_checked_at_the_sizes_of_real_models(monkeypatch):
    seen = []

    def attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, kept, scale):
        seen.append((x.dtype, x.shape[1], kept.whole_columns.shape[1]))
        return uvc_kernels.attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, kept, scale)

    monkeypatch.setattr(self_check, "attention", attention)
    assert self_check.fault("attention", "cpu", CPU, torch.bfloat16) is None
    assert {(torch.bfloat16, 197, 64), (torch.bfloat16, 198, 128)} <= set(seen)


def test_no_check_runs_while_a_graph_is_captured(monkeypatch):
    ran = []
    monkeypatch.setattr(_dispatch, "_proofs", {})
    monkeypatch.setattr(_dispatch, "_checks", [lambda *case: ran.append(case)])
    monkeypatch.setattr(_dispatch, "capturing", lambda device: True)
    assert not _dispatch._proven("mlp", HOST, CPU, torch.float32) and ran == []
    monkeypatch.setattr(_dispatch, "capturing", lambda device: False)
    assert _dispatch._proven("mlp", HOST, CPU, torch.float32) and len(ran) == 1


def test_on_a_gpu_the_examples_have_the_sizes_of_real_models_and_heads_for_all_of_it(monkeypatch):
    of_gpu = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_gpu)
    examples = list(self_check._heads(torch.device("cuda")))
    sizes = {(tokens, qk.shape[1]): images * len(qk) for images, tokens, qk, _ in examples}
    assert {(197, 64), (198, 128), (577, 64)} <= sizes.keys()
    assert sizes[197, 64] == 264


def test_what_is_exact_has_the_sizes_of_the_device_that_is_checked(monkeypatch):
    # A GPU has examples that a CPU does not have.
    asked = []

    def example(device, dtype):
        asked.append((device.type, dtype))
        return [torch.ones(2, dtype=dtype)] * (3 if device.type == "cuda" else 2)

    monkeypatch.setitem(self_check.EXAMPLES, "mlp", example)
    assert self_check.errors("mlp", "reference", torch.device("cuda"), torch.float32) == (0.0, 0.0)
    assert asked == [("cuda", torch.float64), *[("cuda", torch.float32)] * 2]

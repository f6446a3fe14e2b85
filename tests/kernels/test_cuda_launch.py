"""What a launch asks of the driver: more shared memory than 48 KB, once for each kernel and GPU.

The host build keeps what every kernel is allowed, as the driver does, and refuses a launch of more.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier

import pytest
import torch
import uvc_kernels
from on_cuda import ops
from uvc_kernels import _dispatch
from uvc_kernels.indices import counts_of

if _dispatch.extension_error is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

NEW_GPU = count(100)  # one that no test has used


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setenv("UVC_HOST_DEVICE", str(next(NEW_GPU)))
    uvc_kernels._C.host_record()


def backward(tokens):
    """The backward pass of one head of so many tokens of 64 dims: 62 KB at 100 tokens, 187 KB at 197."""
    whole = torch.ones(1, 64, dtype=torch.bool)
    kept = uvc_kernels.kept_heads(whole, whole)
    qkv = torch.ones(tokens, len(kept.rows)).bfloat16()
    heads, top = qkv.new_zeros(tokens, len(kept.columns)), torch.zeros(1, tokens)
    grad, counts = torch.empty_like(qkv), counts_of(kept)
    ops.cuda_attention_core_backward(
        qkv, heads, heads, top, torch.ones_like(top), kept.table, counts, tokens, 0.125, grad
    )


def calls():
    """How often a kernel was allowed more since the last time."""
    return uvc_kernels._C.host_record()[5]


def test_a_kernel_is_allowed_more_once_and_not_where_it_needs_none():
    backward(17)
    assert calls() == 0
    for tokens in (100, 197, 120, 197):
        backward(tokens)
    assert calls() == 1
    backward(241)  # another kernel, which streams
    backward(241)
    assert calls() == 1


def test_every_gpu_is_asked(monkeypatch):
    for _ in range(2):
        monkeypatch.setenv("UVC_HOST_DEVICE", str(next(NEW_GPU)))
        backward(197)
    assert calls() == 2


def test_threads_that_launch_a_kernel_at_once_take_nothing_from_each_other(monkeypatch):
    # The driver is slow before and after it writes the bound: every thread meets the others in between.
    monkeypatch.setenv("UVC_HOST_DRIVER", "slow")
    sizes, together = (100, 197, 120, 160), Barrier(4)

    def launch(tokens):
        together.wait(timeout=60)
        backward(tokens)

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(launch, sizes))
    assert calls() == 1

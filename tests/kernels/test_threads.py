"""Work that is cut for several threads is as exact, and as complete, as that of one."""

import pytest
import torch
import uvc_kernels
from accuracy import check, random, with_gradients


@pytest.fixture(params=[2, 3, 5], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def attention(images, tokens, biases=True, heads=3, dims=16, width=72):
    """An attention whose kept channels are no multiple of a share's unit, and its inputs."""
    A = heads * dims
    qk, v = (torch.rand(heads, dims) < 0.7 for _ in range(2))
    kept = uvc_kernels.kept_heads(qk, v)
    bias = (random(3 * A), random(width)) if biases else (None, None)
    tensors = [random(images, tokens, width), random(3 * A, width) * 0.3, bias[0], random(width, A), bias[1]]
    return lambda *given: uvc_kernels.attention(*given, kept, 0.25), tensors


def mlp(images, tokens, gated=False, kept=101, hidden=200, width=72):
    neurons = uvc_kernels.kept_neurons(torch.randperm(hidden) < kept)
    gate = [random(hidden, width) * 0.3, random(hidden)] if gated else []
    tensors = [random(images, tokens, width), random(hidden, width) * 0.3, random(hidden)]
    tensors += [random(width, hidden), random(width), *gate]
    return lambda *given: uvc_kernels.mlp(*given[:5], neurons, "gelu", *given[5:]), tensors


SIZES = [(1, 197), (4, 17), (5, 33), (6, 64), (0, 17)]


@pytest.mark.parametrize(("images", "tokens"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_exact_however_many_threads_share_it(images, tokens, dtype, threads):
    check(*attention(images, tokens), dtype)


@pytest.mark.parametrize(("images", "tokens"), SIZES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kept", [101, 64, 1, 0], ids="{} neurons".format)
def test_an_mlp_is_exact_however_many_threads_share_it(images, tokens, gated, kept, threads):
    check(*mlp(images, tokens, gated, kept), torch.float32)


@pytest.mark.parametrize("made", [attention, mlp], ids=["attention", "mlp"])
def test_each_gradient_alone_is_that_of_all_together(made, threads):
    function, tensors = made(4, 33)
    tensors = [t.detach().float() for t in tensors]
    every = with_gradients(function, tensors)[1:]
    for i, expected in enumerate(every):
        given = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        out = function(*given)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(cotangent.bfloat16().to(out))
        torch.testing.assert_close(given[i].grad, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("made", [attention, mlp], ids=["attention", "mlp"])
def test_in_inference_mode_the_threads_write_what_the_caller_made(made, threads):
    function, tensors = made(4, 33)
    tensors = [t.detach().float() for t in tensors]
    expected = function(*tensors)
    with torch.inference_mode():
        torch.testing.assert_close(function(*tensors), expected)

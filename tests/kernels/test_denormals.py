"""Subnormal numbers: the cpu kernels take them for zero; what the caller does with them stays as it was."""

import ctypes
import ctypes.util
import functools
import platform
import threading

import pytest
import torch
import uvc_kernels

ops = torch.ops.uvc_kernels
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the x86 control register")
DENORMAL_OPERAND = 1 << 1


class ControlRegister:
    """MXCSR of this thread, which C's floating-point environment ends in."""

    def __init__(self):
        self.libm = ctypes.CDLL(ctypes.util.find_library("m"))
        self.environment = (ctypes.c_uint32 * 8)()  # 28 bytes of the x87 unit, then MXCSR

    def read(self) -> int:
        self.libm.fegetenv(self.environment)
        return self.environment[7]

    def clear_flags(self) -> None:
        self.environment[7] = self.read() & ~0x3F
        self.libm.fesetenv(self.environment)


def attention_steps(dtype=torch.float32, gradient=1.0):
    """Attention whose softmax reaches far below the smallest number, forward and backward, as two calls."""
    kept = uvc_kernels.kept_heads(torch.rand(4, 16) < 0.6, torch.rand(4, 16) < 0.6)
    x, qkv, bias, proj = (torch.randn(s) for s in ((2, 37, 64), (192, 64), (192,), (64, 64)))
    x, qkv, bias, proj = (t.to(dtype) for t in (x, qkv, bias, proj))
    saved = ops.attention(x, qkv, bias, proj, None, *kept[1:5], 0.5)
    grad = gradient * torch.randn_like(x)
    return (
        lambda: ops.attention(x, qkv, bias, proj, None, *kept[1:5], 0.5),
        lambda: ops.attention_backward(grad, x, qkv, bias, proj, *kept[1:5], 0.5, *saved[1:], 31),
    )


def mlp_steps(dtype=torch.float32, gated=False):
    """An MLP whose activations end far out in the tail, forward and backward."""
    neurons = uvc_kernels.kept_neurons(torch.rand(128) < 0.5).neurons
    x, fc1, fc2, gate = (torch.randn(s).to(dtype) for s in ((2, 37, 64), (128, 64), (64, 128), (128, 64)))
    gate = gate if gated else None
    saved = ops.mlp(x, 2 * fc1, None, fc2, None, gate, None, neurons, 0)
    grad = torch.randn_like(x)
    return (
        lambda: ops.mlp(x, 2 * fc1, None, fc2, None, gate, None, neurons, 0),
        lambda: ops.mlp_backward(grad, x, 2 * fc1, None, fc2, gate, None, neurons, 0, saved[1], 127),
    )


def tiny_steps():
    """The ops on lists, on numbers that are subnormal or whose products are."""
    a, b = torch.full((64, 64), 1e-39), torch.full((64, 64), 0.5)
    every = torch.arange(64, dtype=torch.int32)
    return (
        lambda: ops.group_scores([a, b], [b, b], [0, 1]),
        lambda: ops.prox_shrink([a], torch.full((64,), 0.5), [0]),
        lambda: ops.gather([a], [every], [every], [0], torch.bfloat16),
    )


STEPS = {
    "attention": lambda: attention_steps(),
    "attention with small gradients": lambda: attention_steps(gradient=1e-3),
    "attention in bfloat16": lambda: attention_steps(torch.bfloat16),
    "mlp": lambda: mlp_steps(),
    "gated mlp": lambda: mlp_steps(gated=True),
    "mlp in bfloat16": lambda: mlp_steps(torch.bfloat16),
    "lists": tiny_steps,
}


@on_x86
def test_the_ops_on_lists_read_no_subnormal_number():
    """The others call vendor products, which may raise this flag for what lies beside their operands."""
    register = ControlRegister()
    for step in tiny_steps():
        register.clear_flags()
        step()
        assert not register.read() & DENORMAL_OPERAND


@on_x86
def test_the_register_shows_a_subnormal_operand():
    register, tiny = ControlRegister(), torch.full((64,), 1e-39)
    register.clear_flags()
    tiny * 0.5
    assert register.read() & DENORMAL_OPERAND


class FarawayKey:
    """Attention in which token 0 outweighs all others by e^24; it has one feature, they have another."""

    def __init__(self, value):
        every = torch.ones(8, 8, dtype=torch.bool)
        x, weight = torch.zeros(64, 16, 64), torch.zeros(192, 64)
        x[:, 0, 0], x[:, 1:, 1] = 1.0, 1.0
        weight[64:128, 0], weight[128:, 1] = 3.0, value
        kept = uvc_kernels.kept_heads(every, every)
        self.tensors = x, weight, (torch.arange(192) < 64).float(), torch.eye(64)
        self.rest = *kept[1:5], 1.0
        self.saved = ops.attention(*self.tensors, None, *self.rest)[1:]


def weighted_values():
    """What reaches a head from the others: weights of 4e-11 times values of 1e-30."""
    return FarawayKey(1e-30).saved[1]


def gradients_of_values():
    """What reaches the others' values: the same weights times gradients of 1e-30."""
    case = FarawayKey(1.0)
    grad = torch.full((64, 16, 64), 1e-30)
    grads = ops.attention_backward(grad, *case.tensors, *case.rest, *case.saved, 31)
    return grads[1][128:, 1]


def small_mlp():
    every = torch.arange(512)
    fc1, fc2 = torch.full((512, 1), 2e-38), torch.full((1, 512), 1e10)
    return torch.ones(1024, 1), fc1, fc2, every


def activations():
    """gelu(2e-38) = 1e-38, times 1e10."""
    x, fc1, fc2, every = small_mlp()
    return ops.mlp(x, fc1, None, fc2, None, None, None, every, 0)[0]


def gradients_of_activations():
    """Gradients of 1.5e-38 times a slope of a half, as the bias of the first layer sums them up."""
    x, fc1, fc2, every = small_mlp()
    hidden = ops.mlp(x, fc1, None, fc2, None, None, None, every, 0)[1]
    grad = torch.full((1024, 1), 1.5e-38)
    return ops.mlp_backward(grad, x, fc1, None, torch.ones_like(fc2), None, None, every, 0, hidden, 4)[2]


def products(dim):
    a, b = torch.full((4096, 512), 1e-25), torch.full((4096, 512), 1e-15)
    return ops.group_scores([a, a], [b, b], [dim, dim])


def shrunk(dim):
    weight = torch.full((4096, 512), 1e-25)
    ops.prox_shrink([weight], torch.full((weight.shape[dim],), 1e-15), [dim])
    return weight


def narrowed(dim):
    wide = torch.full((512, 512), 1e-40, dtype=torch.float64)
    every = torch.arange(512, dtype=torch.int32)
    return ops.gather([wide], [every], [every], [dim], torch.float32)[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "compute",
    [
        weighted_values,
        gradients_of_values,
        activations,
        gradients_of_activations,
        *(functools.partial(f, dim) for f in (products, shrunk, narrowed) for dim in (0, 1)),
    ],
    ids=[
        "attention",
        "attention backward",
        "mlp",
        "mlp backward",
        *(f"{op} {dim}" for op in ("scores", "shrink", "gather") for dim in (0, 1)),
    ],
)
def test_every_thread_flushes(compute, threads):
    torch.set_num_threads(threads)
    assert compute().count_nonzero() == 0


def keeps_subnormals(shape=(1 << 20,)):
    """Which of the products in a large tensor, on torch's threads, stay subnormal numbers."""
    return (torch.full(shape, 1e-25) * 1e-15 != 0).float().mean().item()


def failing_call():
    with pytest.raises(RuntimeError, match="lists must be equally long"):
        ops.group_scores([torch.ones(3)], [], [0])


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*STEPS, "failing call"])
def test_the_mode_is_as_before_in_the_caller_and_in_threads_that_a_kernel_started(name, threads, flushing):
    torch.set_num_threads(threads)
    seen = []

    def work(steps):
        torch.set_flush_denormal(flushing)
        for step in steps:
            step()
        seen.append((keeps_subnormals((64,)), keeps_subnormals()))

    # torch's worker threads belong to the thread that first needs them, and inherit its mode then
    for steps in ([], [failing_call] if name == "failing call" else STEPS[name]()):
        thread = threading.Thread(target=work, args=(steps,))
        thread.start()
        thread.join()
    (alone, on_threads), after = seen
    assert after == (alone, on_threads)
    assert alone == (0.0 if flushing and torch.set_flush_denormal(False) else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 197])
def test_subnormal_inputs_count_as_zero_and_harm_nothing(tokens, dtype):
    info = torch.finfo(dtype)
    kept = uvc_kernels.kept_heads(torch.rand(3, 8) < 0.6, torch.rand(3, 8) < 0.6)
    neurons = uvc_kernels.kept_neurons(torch.rand(40) < 0.5)
    x, qkv, bias, proj, fc1, fc2 = (
        torch.randn(s).to(dtype) for s in ((2, tokens, 24), (72, 24), (72,), (24, 24), (40, 24), (24, 40))
    )
    x[:, ::2] = (x[:, ::2].double() * info.smallest_normal / 8).to(dtype)
    qkv[::3] = (qkv[::3].double() * info.smallest_normal / 8).to(dtype)

    def results(flush):
        given = [
            t.masked_fill(t.abs() < info.smallest_normal, 0) if flush else t for t in (x, qkv, bias, proj)
        ]
        leaves = [t.clone().requires_grad_() for t in (*given, fc1, fc2)]
        out = uvc_kernels.attention(leaves[0], leaves[1], leaves[2], leaves[3], None, kept, 0.3)
        out = out + uvc_kernels.mlp(leaves[0], leaves[4], None, leaves[5], None, neurons)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for found, expected in zip(results(False), results(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_subnormal_halves_are_numbers_as_any_other():
    half = torch.arange(-1023, 1024, dtype=torch.int16).clamp(min=0).view(torch.float16)
    every = torch.arange(len(half), dtype=torch.int32)
    for dtype in (torch.float16, torch.float32):
        (out,) = ops.gather([half], [every], [every], [0], dtype)
        assert torch.equal(out, half.to(dtype)) and (out != 0).sum() == 1023

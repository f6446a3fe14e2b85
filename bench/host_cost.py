"""What a layer costs the host, without the work of its kernels: microseconds of Python and dispatch.

    python bench/host_cost.py

A provider whose pieces do nothing serves attention and an MLP, forward and backward, on tensors so small that
their matrix products cost next to nothing; weights are packed ahead, as in a model. What `choose` adds, which
a forced provider passes over, is measured beside it. On a GPU this is what a layer takes where it is not
captured in a graph, as launches do not wait for one another. How many launches these are is counted, too.
"""

import statistics
import time
from functools import partial

import torch
import uvc_kernels
from uvc_kernels import _dispatch, autotune, packed
from uvc_kernels.weights import AttentionWeights, MlpWeights

ROUNDS, CALLS, LAYERS = 30, 10, 12


# Ops of torch that launch a kernel on a GPU; what its sum of a tall matrix clears first is not counted.
LAUNCHING = ("addmm", "mm", "sum", "_to_copy", "add", "add_", "mul")
pieces: list[None] = []  # one for each that was called


def nothing(*arguments) -> None:
    """A piece that does nothing."""
    pieces.append(None)


def launches(call) -> int:
    """Kernels that a call would launch on a GPU."""
    call()
    pieces.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    counts = {event.key.removeprefix("aten::"): event.count for event in profile.key_averages()}
    return len(pieces) + sum(counts.get(name, 0) for name in LAUNCHING)


def microseconds(call) -> float:
    """Of a call, of the processor: the median of rounds, each the mean of many calls."""
    for _ in range(CALLS):
        call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        rounds.append(1e6 * (time.process_time() - start) / CALLS)
    return statistics.median(rounds)


def main() -> None:
    """Prints a line for each op, `choose`, and a layer."""
    torch.set_num_threads(1)
    packed.provide("cuda", "cpu", (torch.float32,), packed.Pieces(*[nothing] * len(packed.Pieces._fields)))
    B, N, D, H, K, F = 1, 4, 16, 2, 8, 32
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x = leaf(B, N, D)
    mask = torch.arange(H * K).view(H, K) % 2 == 0
    heads, neurons = uvc_kernels.kept_heads(mask, mask), uvc_kernels.kept_neurons(torch.arange(F) % 2 == 0)
    a = AttentionWeights(leaf(3 * H * K, D), leaf(3 * H * K), leaf(D, H * K), leaf(D))
    m = MlpWeights(leaf(F, D), leaf(F), leaf(D, F), leaf(D))
    packings = (
        uvc_kernels.attention_packing(*a, heads),
        uvc_kernels.mlp_packing(*_mlp_sources(m), neurons),
    )
    # Every layer has its own, as in a model: gradients of shared ones would be added up.
    ready = [
        [
            [None if t is None else t.detach().clone().requires_grad_() for t in uvc_kernels.gather(*packing)]
            for packing in packings
        ]
        for _ in range(LAYERS)
    ]

    leaves = [x, *(t for layer in ready for packed in layer for t in packed if t is not None)]

    def attend(x: torch.Tensor, layer: list) -> torch.Tensor:
        return uvc_kernels.attention(x, *a, heads, 0.3, layer[0])

    def multiply(x: torch.Tensor, layer: list) -> torch.Tensor:
        return uvc_kernels.mlp(x, *m[:4], neurons, "gelu", *m[4:], packed=layer[1])

    def step(half) -> None:
        out = x
        for layer in ready:
            out = half(out, layer)
        torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)

    def choose() -> None:
        arguments = x, a, heads, 0.3, None, False
        autotune.choose("attention", arguments, 16, 32, case=heads.whole_columns.shape)

    with uvc_kernels.backend("cuda"):
        halves = {"attention": attend, "mlp": multiply}
        layer = {name: microseconds(partial(step, half)) / LAYERS for name, half in halves.items()}
        counts = {name: launches(partial(step, half)) / LAYERS for name, half in halves.items()}
    layer["choose"] = 2 * microseconds(choose)
    for name, cost in layer.items():
        print(f"{name:10} {cost:6.0f} us")
    print(f"{'a layer':10} {sum(layer.values()):6.0f} us")
    print(f"launches: attention {counts['attention']:.1f}, MLP {counts['mlp']:.1f}, forward and backward")


def _mlp_sources(m: MlpWeights) -> tuple:
    return m.fc1_weight, m.fc1_bias, m.gate_weight, m.gate_bias, m.fc2_weight, m.fc2_bias


if __name__ == "__main__":
    _dispatch.provide_later("cuda", lambda: None)  # without a GPU nothing else provides it
    main()

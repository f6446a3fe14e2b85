"""torch's flop counter sees the ops: what is kept, forward and backward, on every backend."""

import itertools

import pytest
import torch
import uvc_kernels
import uvc_kernels.flops
from test_every_backend import BACKENDS, attention_case, mlp_case, on_every_backend, on_triton
from torch.utils.flop_counter import FlopCounterMode
from uvc_kernels import self_check

TOKENS, HEADS, WIDTH = 17, 6, 72
M = TOKENS  # one image


def flops(run, leaves):
    """FLOPs of the forward pass and of the backward pass, by a plain counter."""
    with FlopCounterMode(display=False) as counter:
        out = run()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), [leaf for leaf in leaves if leaf.requires_grad])
    return forward, counter.get_total_flops()


def attention_flops(Q, V, again):
    """By hand; `again`: the backward pass multiplies for the scores once more."""
    products = M * WIDTH * (2 * Q + V), M * TOKENS * (Q + V), M * V * WIDTH
    return 2 * sum(products), 2 * (2 * sum(products) + again * M * TOKENS * Q)


@on_every_backend()
def test_attention_counts_what_is_kept_and_no_padding(backend, dtype):
    tensors, kept = attention_case(TOKENS, HEADS, BACKENDS[backend])
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    Q, V = len(kept.qk), len(kept.v)
    assert 0 < V < len(kept.columns) and 0 < 2 * Q < len(kept.rows) - len(kept.columns)
    with uvc_kernels.backend(backend):
        found = flops(lambda: uvc_kernels.attention(*leaves, kept, 0.125), leaves)
    # The reference keeps its scores.
    assert found == attention_flops(Q, V, again=backend != "reference")


@on_every_backend()
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_mlp_counts_what_is_kept_and_no_padding(backend, dtype, gated):
    tensors, mlp = mlp_case(7, TOKENS, gated, BACKENDS[backend])
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    with uvc_kernels.backend(backend):
        forward, backward = flops(lambda: mlp(*leaves), leaves)
    assert forward == 2 * M * 7 * WIDTH * (3 if gated else 2)
    assert backward == 2 * forward


# Weights that are packed together get their gradients together.
PACKED = [[0], [4], [0, 4], [1, 2, 3], [0, 1, 2, 3, 4]]
ALL = [*PACKED, [1], [2], [3], [2, 3]]
SUBSETS = {"cpu": ALL, "cuda-host": PACKED, "triton": PACKED if on_triton else []}
CASES = [(backend, trained) for backend, each in SUBSETS.items() for trained in each]


@pytest.mark.parametrize(("backend", "trained"), CASES, ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_only_gradients_that_are_asked_for_count(backend, trained, recompute):
    (tensors, kept), asked = attention_case(TOKENS, HEADS, BACKENDS[backend]), set(trained)
    leaves = [t.float().requires_grad_(i in asked) for i, t in enumerate(tensors)]
    with uvc_kernels.backend(backend):
        backward = flops(lambda: uvc_kernels.attention(*leaves, kept, 0.125, recompute=recompute), leaves)[1]
    Q, V = len(kept.qk), len(kept.v)
    qkv, core, projection = WIDTH * (2 * Q + V), TOKENS * (3 * Q + 2 * V), V * WIDTH
    inner = core + projection + qkv * recompute if asked & {0, 1, 2} else 0
    assert backward == 2 * M * (qkv * len(asked & {0, 1}) + projection * (3 in asked) + inner)

    neurons = uvc_kernels.kept_neurons(torch.arange(100) < 7, BACKENDS[backend])
    tensors = mlp_case(7, TOKENS, False, BACKENDS[backend])[0]
    leaves = [t.float().requires_grad_(i in asked) for i, t in enumerate(tensors)]
    with uvc_kernels.backend(backend):
        backward = flops(lambda: uvc_kernels.mlp(*leaves, neurons, recompute=recompute), leaves)[1]
    products = len(asked & {0, 1}) + (3 in asked) + bool(asked & {0, 1, 2})
    assert backward == 2 * M * 7 * WIDTH * (products + (recompute and bool(asked & {0, 1, 2, 3})))


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda-host"])
def test_nothing_kept_counts_nothing(backend):
    leaves = [t.float().requires_grad_() for t in attention_case(TOKENS, HEADS, "cpu")[0]]
    kept = uvc_kernels.kept_heads(*torch.zeros(2, HEADS, 64, dtype=torch.bool))
    with uvc_kernels.backend(backend):
        assert flops(lambda: uvc_kernels.attention(*leaves, kept, 0.125), leaves) == (0, 0)


def test_the_ops_of_every_provider_are_known_before_it_is_loaded():
    known, ops = FlopCounterMode(display=False).flop_registry, torch.ops.uvc_kernels
    for kind in ("", "_backward"):
        for op, provider in itertools.product(("attend", "packed_mlp"), ("triton", "cuda", "cuda_host")):
            assert getattr(ops, f"{op}{kind}_{provider}") in known


def test_a_counter_does_not_see_a_self_check():
    with FlopCounterMode(display=False) as counter:
        assert self_check.fault("mlp", "cpu", torch.device("cpu"), torch.float32) is None
    assert counter.get_total_flops() == 0

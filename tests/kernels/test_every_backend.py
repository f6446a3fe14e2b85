"""One suite for every op on every backend: error, gradients, dtypes, shapes, repeats.

triton runs in its interpreter and cuda as its host build where there is no GPU. `-m slow` adds the rest of
the product of shapes.
"""

import accuracy
import pytest
import torch
import uvc_kernels
from backends import BACKENDS, GPU, HALF, on_every_backend, on_triton
from uvc_kernels import self_check

TOKENS, HEADS, NEURONS = (1, 17, 50, 63, 196, 197, 198, 577), (1, 3, 6, 12, 16), (0, 1, 7, 100, 1536)
PRODUCTS = [("cpu", torch.float64), ("cpu", torch.float16)]  # what attention and MLP take besides
WIDTH = 72  # of a token; above 64, so that no result is so short that its error must be pooled


@pytest.fixture(autouse=True)
def packing_in_large_tiles(request, monkeypatch):
    # The interpreter pays by the program, and most would copy weights: what is slow here is not about gather.
    if request.node.get_closest_marker("slow") and on_triton is not None and on_triton.DEVICE == "cpu":
        monkeypatch.setattr("uvc_kernels.triton.gather.TILE", on_triton.Tile(128, 256))


def numbers(*shapes, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def ragged(heads, dims=64):
    """Kept dims from none to all: some heads vanish, one kept head has no q/k dim."""
    generator = torch.Generator().manual_seed(heads)
    share = torch.rand(2, heads, 1, generator=generator) * 1.4 - 0.2
    qk, v = torch.rand(2, heads, dims, generator=generator) < share
    v[0, :5], qk[0] = True, False
    return qk, v


def attention_case(tokens, heads, device, width=WIDTH, dims=64):
    A = heads * dims
    x, qkv, bias, proj, proj_bias = numbers(
        (1, tokens, width), (3 * A, width), 3 * A, (width, A), width, device=device
    )
    return [x, qkv * 0.2, bias, proj * 0.2, proj_bias], uvc_kernels.kept_heads(*ragged(heads, dims), device)


quick_attention = [(t, 3) for t in TOKENS if t < 577] + [(17, h) for h in HEADS]


all_attention = [(t, h) for t in TOKENS for h in HEADS]


@on_every_backend(quick_attention, [(1, 1), (17, 3), (17, 6), (197, 1)], all_attention, PRODUCTS)
def test_attention_is_at_most_twice_as_wrong_as_plain_torch(backend, dtype, size):
    tensors, kept = attention_case(*size, BACKENDS[backend])
    accuracy.check(lambda *t: uvc_kernels.attention(*t, kept, 0.125), tensors, dtype, backend)


# Images, (I, G) of the tables that turn, (P, heads) of the bias.
PLACED = {
    "one table": (2, (1, 1), None),
    "a table of each head": (2, (1, 3), None),
    "a table of each image": (2, (2, 1), None),
    "tables of images and heads": (5, (5, 3), None),
    "a bias of each head": (2, None, (1, 3)),
    "one bias for all heads": (2, None, (1, 1)),
    "a bias of each window": (4, None, (2, 3)),
    "tables and a bias": (5, (1, 3), (5, 3)),
}


def positions_case(placed, tokens, device, dims=64, keep=None):
    """Tensors, bias behind the weights where there is one, what is kept, and what turns."""
    images, tables, biases = PLACED[placed]
    partner = torch.arange(dims).roll(dims // 2) if images == 2 else torch.arange(dims) ^ 1
    qk, v = ragged(3, dims) if keep is None else keep
    kept = uvc_kernels.kept_heads(qk & qk[:, partner], v, device)
    A = 3 * dims
    shapes = [(images, tokens, WIDTH), (3 * A, WIDTH), 3 * A, (WIDTH, A), WIDTH]
    if biases is not None:
        heads = len(kept.table) if biases[1] > 1 else 1
        shapes.append((biases[0], heads, tokens, tokens))
    x, qkv, bias, proj, *rest = numbers(*shapes, device=device)
    positions = uvc_kernels.Positions()
    if tables is not None:
        (angles,) = numbers((*tables, tokens - 1, dims))
        turn = uvc_kernels.turn_of(angles.sin(), angles.cos(), partner, 1)
        positions = uvc_kernels.Positions(turn.to(device), partner.to(device))
    return [x, qkv * 0.2, bias, proj * 0.2, *rest], kept, positions


def attend_with_positions(kept, positions, scale=0.125, recompute=False):
    def run(*tensors):
        given = positions._replace(bias=tensors[5]) if len(tensors) > 5 else positions
        return uvc_kernels.attention_with_positions(*tensors[:5], kept, scale, given, recompute)

    return run


@on_every_backend([(2,), (17,), (70,)], [(17,)], [(2,), (17,), (70,), (197,)])
@pytest.mark.parametrize("placed", PLACED)
def test_attention_with_positions_is_at_most_twice_as_wrong_as_plain_torch(backend, dtype, size, placed):
    tensors, kept, positions = positions_case(placed, *size, BACKENDS[backend])
    accuracy.check(attend_with_positions(kept, positions), tensors, dtype, backend)


@on_every_backend(without=("reference",))
def test_positions_with_recomputing_give_the_same_bits(backend, dtype):
    tensors, kept, positions = positions_case("tables and a bias", 17, BACKENDS[backend])
    tensors = [t.to(dtype) for t in tensors]
    with uvc_kernels.backend(backend):
        one, other = (
            accuracy.with_gradients(attend_with_positions(kept, positions, recompute=again), tensors)
            for again in (False, True)
        )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def mlp_case(neurons, tokens, gated, device, width=WIDTH):
    F = max(100, neurons)
    shapes = [(1, tokens, width), (F, width), F, (width, F), width] + [(F, width), F] * gated
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    kept = uvc_kernels.kept_neurons(order < neurons, device)
    activation = "silu" if gated else "gelu"
    return numbers(*shapes, device=device), lambda *t: uvc_kernels.mlp(*t[:5], kept, activation, *t[5:])


quick_mlp = [(n, 17) for n in NEURONS] + [(100, t) for t in (1, 63, 197)]


all_mlp = [(n, t) for n in NEURONS for t in TOKENS]


@on_every_backend(quick_mlp, [(0, 17), (7, 17), (100, 17)], all_mlp, PRODUCTS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_mlp_is_at_most_twice_as_wrong_as_plain_torch(backend, dtype, size, gated):
    tensors, mlp = mlp_case(*size, gated, BACKENDS[backend])
    accuracy.check(mlp, tensors, dtype, backend)


@on_every_backend()
@pytest.mark.parametrize("to", [None, torch.bfloat16, torch.float32], ids=["same", "bfloat16", "float32"])
def test_gather_and_its_gradient_are_exact(backend, dtype, to):
    device = BACKENDS[backend]
    kept = uvc_kernels.kept_neurons(torch.arange(41) % 3 == 1, device)
    sources = [t.to(dtype).requires_grad_() for t in numbers((41, 24), 41, (7, 41), (41, 0), device=device)]
    places = [kept.rows] * 4, [kept.whole] * 4, [0, 0, 1, 0]
    results = []
    for name in ("reference", backend):
        with uvc_kernels.backend(name):
            packed = uvc_kernels.gather(sources, *places, to)
            grads = torch.autograd.grad(packed, sources, [p.detach() * 0.5 for p in packed])
        results.append([*packed, *grads])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@on_every_backend()
def test_gather_spreads_to_what_is_asked_for_only(backend, dtype):
    device = BACKENDS[backend]
    kept = uvc_kernels.kept_neurons(torch.arange(20) < 9, device)
    frozen, trained = (t.to(dtype) for t in numbers((20, 8), (8, 20), device=device))
    trained.requires_grad_()
    with uvc_kernels.backend(backend):
        first, missing, second = uvc_kernels.gather(
            [frozen, None, trained], [kept.rows] * 3, [kept.whole] * 3, [0, 0, 1]
        )
        (first.sum() + second.sum()).backward()
    assert missing is None and torch.equal(trained.grad, (kept.whole >= 0).to(dtype).expand(8, 20))


SOLVER_SHAPES = [
    ((12, 20), 0),
    ((12, 20), 1),
    ((197,), 0),
    ((1, 64), 1),
    ((65, 3), 0),
    ((0, 5), 0),
    ((5, 0), 1),
]


@on_every_backend()
def test_scores_of_all_layers_are_exact_sums(backend, dtype):
    device = BACKENDS[backend]
    shapes, dims = [s for s, _ in SOLVER_SHAPES], [d for _, d in SOLVER_SHAPES]
    a, b = ([t.to(dtype) for t in numbers(*shapes, device=device)] for _ in range(2))
    with uvc_kernels.backend("reference"):
        exact = uvc_kernels.group_scores([t.double() for t in a], [t.double() for t in b], dims)
    with uvc_kernels.backend(backend):
        found = uvc_kernels.group_scores(a, b, dims)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@on_every_backend()
def test_shrinking_all_layers_multiplies_snaps_and_leaves_alone(backend, dtype):
    device = BACKENDS[backend]
    shapes, dims = [s for s, _ in SOLVER_SHAPES], [d for _, d in SOLVER_SHAPES]
    total = sum(s[d] for s, d in SOLVER_SHAPES)
    factors = (torch.arange(total, device=device) % 5) / 4
    results = []
    for name in ("reference", backend):
        weights = [t.to(dtype) for t in numbers(*shapes, device=device)]
        weights[0][0, 0] = float("inf")  # a factor of zero writes zero whatever stood there
        with uvc_kernels.backend(name):
            uvc_kernels.prox_shrink(weights, factors, dims)
        results.append(weights)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7 if dtype in HALF else 1e-6, atol=0)
        assert torch.equal(found == 0, expected == 0)


@on_every_backend([(200,)], [(10,)], [(10,), (200,)])
def test_repeats_are_bit_equal(backend, dtype, size):
    device, (repeats,) = BACKENDS[backend], size
    tensors, kept = attention_case(17, 2, device, width=16, dims=16)
    neurons, mlp = mlp_case(7, 17, True, device, width=16)
    tensors, neurons = ([t.to(dtype) for t in given] for given in (tensors, neurons))
    first = None
    with uvc_kernels.backend(backend):
        for _ in range(repeats):
            results = accuracy.with_gradients(lambda *t: uvc_kernels.attention(*t, kept, 0.25), tensors)
            results += accuracy.with_gradients(mlp, neurons)
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_every_op_of_every_backend_here_was_registered():
    for backend, device in BACKENDS.items():
        if (device == "cuda" and not GPU) or (backend == "triton" and on_triton is None):
            continue
        with uvc_kernels.backend(backend):
            for op in self_check.EXAMPLES:
                assert uvc_kernels.select(op, torch.device(device), torch.float32) == backend

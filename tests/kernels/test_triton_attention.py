"""Attention on Triton: accuracy, exact zeros, when it waits for the device, and that torch can trace it."""

import pytest
import torch
import torch.nn.functional as F
import uvc_kernels
from accuracy import with_gradients
from on_triton import DEVICE, DTYPES, check, forced, interpreted, random
from torch.nn.attention import SDPBackend, sdpa_kernel

GPU = DEVICE == "cuda"
op = torch.ops.uvc_kernels.attend_triton.default
backward = torch.ops.uvc_kernels.attend_backward_triton.default


def inputs(tokens, heads, dims, batch=1, width=24, out=64, biases=True):
    A = heads * dims
    x, qkv, proj = random(batch, tokens, width), random(3 * A, width) * 0.3, random(out, A)
    return [x, qkv, random(3 * A) if biases else None, proj, random(out) if biases else None]


def ragged(heads, dims, keep=0.5):
    """Every head keeps other q/k dims than v dims; the first kept head has no q/k dim at all."""
    qk, v = (torch.rand(heads, dims) < keep for _ in range(2))
    v[0, 0], qk[0] = True, False
    return uvc_kernels.kept_heads(qk.to(DEVICE), v.to(DEVICE))


def dense(heads, dims):
    mask = torch.ones(heads, dims, dtype=torch.bool, device=DEVICE)
    return uvc_kernels.kept_heads(mask, mask)


def attend(kept, scale=0.25):
    return lambda *tensors: uvc_kernels.attention(*tensors, kept, scale)


def slow(*parameters):
    return pytest.param(*parameters, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])


# Every tile pattern in the usual run, with the tokens that fill and overflow it.
TOKENS = (1, 17, 50, 63, 64, 65, 128, 129, 196, 197, 198, 208, 209, 256, 257, 577)
USUAL = {
    (17, "float32"),
    (1, "bfloat16"),
    (63, "float16"),
    (65, "bfloat16"),
    (197, "bfloat16"),
    (65, "float32"),
}
EACH = [(n, dtype) if (n, str(dtype)[6:]) in USUAL else slow(n, dtype) for n in TOKENS for dtype in DTYPES]


@pytest.mark.parametrize(("tokens", "dtype"), EACH, ids=str)
def test_ragged_attention_is_as_exact_as_plain_torch(tokens, dtype):
    check(attend(ragged(3, 24, 0.6)), inputs(tokens, 3, 24, batch=1 + 3 // tokens), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_negative_scale_is_fine(dtype):
    check(attend(ragged(3, 24, 0.7), -0.25), inputs(17, 3, 24), dtype)


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        (1, torch.float32),
        (17, torch.float32),
        (16, torch.bfloat16),
        (33, torch.bfloat16),
        (128, torch.bfloat16),
    ]
    + [slow(dims, dtype) for dims in (1, 8, 16, 17, 33, 64, 65, 128) for dtype in DTYPES],
    ids=str,
)
def test_every_tile_width_is_right(dims, dtype):
    check(attend(dense(2, dims), dims**-0.5), inputs(20, 2, dims), dtype)


def test_heads_of_very_different_widths_share_a_launch():
    qk, v = torch.zeros(4, 64, dtype=torch.bool), torch.zeros(4, 64, dtype=torch.bool)
    for head, (q_dims, v_dims) in enumerate([(64, 1), (0, 64), (5, 30), (9, 0)]):
        qk[head, :q_dims], v[head, 64 - v_dims :] = True, True
    kept = uvc_kernels.kept_heads(qk.to(DEVICE), v.to(DEVICE))
    check(attend(kept, 0.125), inputs(33, 4, 64), torch.float32)


def test_scores_of_any_size_neither_overflow_nor_vanish():
    x, qkv, *rest = inputs(17, 2, 8)
    tensors, kept = [x * 30, qkv * 3, *rest], ragged(2, 8, keep=0.9)
    with uvc_kernels.backend("reference"):
        exact = with_gradients(attend(kept, 1.0), tensors)
    found = with_gradients(forced(attend(kept, 1.0)), [t.float() for t in tensors])
    # dS = P (dP - do.o): the two are nearly equal where a score of 1e5 leaves the others no weight, are added
    # up in different orders, and what is left of them is multiplied by keys of the size of hundreds.
    assert x.abs().max() * 30 * qkv.abs().max() * 3 > 100
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).abs().max() <= 0.02 * b.abs().max()


# On a GPU plain torch has an exponential of its own, and scores of hundreds multiply what that differs by.
@pytest.mark.parametrize("scale", [0.5, pytest.param(2.0, marks=pytest.mark.skipif(GPU, reason="a GPU"))])
def test_sharp_attention_is_as_exact_as_plain_torch(scale):
    check(attend(ragged(2, 8, keep=0.9), scale), inputs(17, 2, 8), torch.float32)


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_sharp_attention_is_as_exact_as_torchs_fused_attention(scale):
    ours = forced(attend(dense(2, 8), scale))

    def fused(x, qkv_weight, qkv_bias, *proj):
        q, k, v = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return F.linear(out.transpose(1, 2).flatten(2), *proj)

    errors = {ours: [], fused: []}
    for seed in range(8):
        torch.manual_seed(seed)
        tensors = inputs(17, 2, 8)
        with uvc_kernels.backend("reference"):
            exact = with_gradients(attend(dense(2, 8), scale), tensors)
        for run, found in errors.items():
            pairs = zip(with_gradients(run, [t.float() for t in tensors]), exact, strict=True)
            found.append(torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]))
    mine, theirs = (torch.stack(found).amax(0) for found in errors.values())
    assert (mine <= 1.5 * theirs + 1e-7).all(), (mine, theirs)


def test_nothing_is_read_from_the_device(monkeypatch):
    tensors, kept = [t.float() for t in inputs(9, 2, 8)], ragged(2, 8)
    expected = with_gradients(forced(attend(kept)), tensors)

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    for name in ("tolist", "item", "cpu", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = forced(attend(kept))(*leaves)
    out.backward(torch.ones_like(out))
    monkeypatch.undo()
    assert torch.equal(out, expected[0]) and all(leaf.grad is not None for leaf in leaves)


@interpreted
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck_passes(biases):
    kept = ragged(3, 4)
    S, V = len(kept.rows), len(kept.columns)
    bias, proj_bias = (random(S), random(7)) if biases else (None, None)
    tensors = [random(2, 5, 6), random(S, 6), bias, random(7, V), proj_bias]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    given = (kept.qk, kept.v, kept.table, *kept[-4:], 0.5, False)
    torch.library.opcheck(op, (*leaves, *given))
    detached = [None if t is None else t.detach() for t in leaves]
    out, *saved = op(*detached, *given)
    for needs in (0b11111, 0b01001) if biases else (0b01011, 0b01001):
        arguments = (torch.ones_like(out), *detached, *given, *saved, needs)
        torch.library.opcheck(backward, arguments)


@interpreted
@pytest.mark.parametrize("kind", ["ragged", "no heads", "no biases"])
def test_gradcheck_passes(kind):
    none = torch.zeros(2, 3, dtype=torch.bool)
    kept = uvc_kernels.kept_heads(none, none) if kind == "no heads" else ragged(2, 3)
    tensors = inputs(3, 2, 3, width=2, out=2, biases=kind != "no biases")
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(forced(attend(kept)), leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("dims", "change", "message"),
    [
        (8, lambda t, kept: ([t[0].half(), *t[1:]], kept), "one dtype"),
        (129, lambda t, kept: (t, kept), "more than 128 dims"),
    ],
    ids=["mixed dtypes", "too wide"],
)
def test_what_does_not_fit_is_one_clear_line(dims, change, message):
    tensors, kept = change([t.float() for t in inputs(5, 3, dims)], dense(3, dims))
    with uvc_kernels.backend("triton"), pytest.raises((ValueError, RuntimeError), match=message) as caught:
        uvc_kernels.attention(*tensors, kept, 0.25)
    assert "\n" not in str(caught.value)

"""The attention core of csrc/cuda: accuracy in every form it takes, determinism, and clear refusals."""

import accuracy
import pytest
import torch
import uvc_kernels
from on_cuda import (  # noqa: F401
    CASES,
    PROVIDERS,
    at_the_end,
    fenced,
    on_every_build,
    on_every_type,
    ops,
    poisoned,
    statistics,
)
from torch.utils._python_dispatch import TorchDispatchMode
from uvc_kernels import cuda
from uvc_kernels.indices import counts_of
from uvc_kernels.packed.attention import _attend


def ragged(heads, dims, keep=0.6):
    """Every head keeps other q/k dims than v dims; the first kept head has no q/k dim at all."""
    qk, v = (torch.rand(heads, dims) < keep for _ in range(2))
    v[0, 0], qk[0] = True, False
    return uvc_kernels.kept_heads(qk, v)


def dense(heads, dims):
    mask = torch.ones(heads, dims, dtype=torch.bool)
    return uvc_kernels.kept_heads(mask, mask)


def packed(kept, tokens, images, dtype):
    """Packed qkv and the gradient of heads, normal numbers with zeros in the padding."""
    rows = images * tokens
    qkv = torch.randn(rows, len(kept.rows), dtype=torch.float64) * (kept.rows >= 0)
    grad = torch.randn(rows, len(kept.columns), dtype=torch.float64) * (kept.columns >= 0)
    return qkv.to(dtype), grad.to(dtype)


def core(qkv, grad, kept, tokens, scale, device):
    """What the two pieces write: heads, top, inverse and the gradient of qkv."""
    qkv, grad, table = (t.to(device) for t in (qkv, grad, kept.table))
    sums = statistics(qkv.dtype)
    heads = poisoned(*grad.shape, dtype=qkv.dtype, device=device)
    top, inverse = (poisoned(len(table), len(qkv), dtype=sums, device=device) for _ in range(2))
    grad_qkv = poisoned(*qkv.shape, dtype=qkv.dtype, device=device)
    counts = counts_of(kept)
    ops.cuda_attention_core(qkv, table, counts, tokens, scale, heads, top, inverse)
    ops.cuda_attention_core_backward(qkv, heads, grad, top, inverse, table, counts, tokens, scale, grad_qkv)
    return [t.cpu() for t in (heads, top, inverse, grad_qkv)]


def plain(qkv, grad, kept, tokens, scale, dtype):
    """The same by plain torch in `dtype`: heads and the gradient of qkv."""
    qkv = qkv.detach().to(dtype, copy=True).requires_grad_()
    heads = torch.zeros(grad.shape, dtype=dtype)
    for q, k, v, out, qk_width, v_width in kept.table.tolist():
        q, k, v = (
            qkv[:, at : at + width].view(len(qkv) // tokens, tokens, width)
            for at, width in ((q, qk_width), (k, qk_width), (v, v_width))
        )
        p = torch.softmax(q @ k.transpose(1, 2) * scale, -1)
        heads = heads.index_add(1, torch.arange(out, out + v_width), (p @ v).reshape(len(qkv), v_width))
    heads.backward(grad.to(dtype))
    return heads.detach(), qkv.grad


def check(kept, tokens, dtype, provider="cuda-host", images=1, scale=None):
    scale = 0.125 if scale is None else scale
    qkv, grad = packed(kept, tokens, images, dtype)
    exact = plain(qkv, grad, kept, tokens, scale, torch.float64)
    usual = plain(qkv, grad, kept, tokens, scale, dtype)
    heads, _, _, grad_qkv = core(qkv, grad, kept, tokens, scale, PROVIDERS[provider])
    for name, a, b, c in zip(("heads", "gradient"), (heads, grad_qkv), usual, exact, strict=True):
        error = (a.double() - c).abs().max().nan_to_num(float("inf"))
        allowed = 2 * (b.double() - c).abs().max() + accuracy.FLOOR[dtype] * c.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@on_every_type
@pytest.mark.parametrize("tokens", [1, 17, 50, 63, 196, 197, 198])
def test_ragged_heads_are_as_exact_as_plain_torch(tokens, provider, dtype):
    check(ragged(3, 64), tokens, dtype, provider)


@on_every_type
def test_a_sequence_that_streams_is_as_exact_as_plain_torch(provider, dtype):
    check(ragged(2, 64), 577, dtype, provider)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [240, 241, 256, 257, 1025])
def test_every_length_finds_its_form(tokens, dtype):
    check(ragged(1, 24, 0.9), tokens, dtype)
    check(dense(1, 64), tokens, dtype)


@on_every_type
@pytest.mark.parametrize("heads", [1, 3, 6, 12, 16])
def test_every_head_of_every_image_is_its_own(heads, provider, dtype):
    check(ragged(heads, 24), 17, dtype, provider, images=3)


@on_every_type
@pytest.mark.parametrize("dims", [1, 8, 16, 17, 33, 40, 64, 65, 80, 128])
def test_every_width_is_right(dims, provider, dtype):
    check(dense(2, dims), 50, dtype, provider)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [72, 128])
def test_wide_heads_of_whole_images_are_right(dims, dtype):
    check(ragged(2, dims, 0.9), 197, dtype)


def test_heads_of_very_different_widths_share_a_call():
    qk, v = torch.zeros(5, 96, dtype=torch.bool), torch.zeros(5, 96, dtype=torch.bool)
    for head, (q_dims, v_dims) in enumerate([(64, 1), (0, 64), (5, 30), (9, 0), (96, 70)]):
        qk[head, :q_dims], v[head, 96 - v_dims :] = True, True
    for dtype in (torch.float32, torch.float16):
        check(uvc_kernels.kept_heads(qk, v), 33, dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0], ids=["negative", "zero", "sharp"])
def test_any_scale_is_fine(scale):
    check(dense(2, 32), 50, torch.float32, scale=scale)
    check(ragged(2, 32), 50, torch.float64, scale=scale)


@on_every_type
def test_statistics_give_the_weights_back(provider, dtype):
    kept = dense(1, 16)
    qkv, grad = packed(kept, 70, 1, dtype)
    _, top, inverse, _ = core(qkv, grad, kept, 70, 0.25, PROVIDERS[provider])
    scores = qkv[:, :16].double() @ qkv[:, 16:32].double().t() * 0.25
    weights = torch.exp2(scores / torch.log(torch.tensor(2.0)).double() - top[0].double()[:, None])
    torch.testing.assert_close(
        weights * inverse[0].double()[:, None], scores.softmax(1), rtol=1e-4, atol=1e-6
    )


def test_scores_that_grow_along_the_keys_are_followed():
    # later keys beat earlier ones by far more than the slack of the running reference, again and again
    kept = dense(1, 16)
    qkv, grad = packed(kept, 200, 1, torch.float64)
    qkv[:, 16:32] *= torch.linspace(0.1, 12, 200)[:, None]
    exact = plain(qkv, grad, kept, 200, 1.0, torch.float64)
    heads, _, _, grad_qkv = core(qkv, grad, kept, 200, 1.0, "cpu")
    torch.testing.assert_close(heads, exact[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_qkv, exact[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [68, 300], ids=["whole head", "streaming"])
def test_nothing_is_touched_behind_a_tensor(tokens, dtype):
    # Each ends where memory ends: what touches a byte more ends the process.
    kept = dense(1, 24)
    qkv, grad = map(at_the_end, packed(kept, tokens, 1, dtype))
    heads, grad_qkv = at_the_end(torch.empty_like(grad)), at_the_end(torch.empty_like(qkv))
    top, inverse = (at_the_end(torch.empty(1, tokens)) for _ in range(2))
    table, counts = at_the_end(kept.table), counts_of(kept)
    ops.cuda_attention_core(qkv, table, counts, tokens, 0.2, heads, top, inverse)
    ops.cuda_attention_core_backward(qkv, heads, grad, top, inverse, table, counts, tokens, 0.2, grad_qkv)
    assert all(map(torch.equal, (heads, top, inverse, grad_qkv), core(qkv, grad, kept, tokens, 0.2, "cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [70, 300], ids=["whole head", "streaming"])
def test_scores_far_below_zero_leave_no_weight_behind_the_last_key(tokens, dtype):
    # All scores near -400: a key behind the last, whose score is 0, would have a weight of e^400.
    kept = dense(1, 16)
    qkv, grad = packed(kept, tokens, 1, dtype)
    qkv[:, :16], qkv[:, 16:32] = 10 + qkv[:, :16] / 100, -10 + qkv[:, 16:32] / 100
    exact = plain(qkv, grad, kept, tokens, 0.25, torch.float64)
    heads, _, _, grad_qkv = core(qkv, grad, kept, tokens, 0.25, "cpu")
    usual = plain(qkv, grad, kept, tokens, 0.25, dtype)
    for a, b, c in zip((heads, grad_qkv), usual, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + accuracy.FLOOR[dtype] * c.abs().max()
        assert (a.double() - c).abs().max().nan_to_num(float("inf")) <= allowed


@on_every_build
@pytest.mark.parametrize("tokens", [65, 300], ids=["whole head", "streaming"])
def test_two_hundred_repeats_are_bit_equal(device, tokens):
    kept = ragged(2, 40)
    qkv, grad = packed(kept, tokens, 1, torch.bfloat16)
    first = core(qkv, grad, kept, tokens, 0.2, device)
    for _ in range(200 if tokens < 100 or device == "cuda" else 20):
        assert all(map(torch.equal, first, core(qkv, grad, kept, tokens, 0.2, device)))


def test_the_order_of_threads_changes_nothing():
    # blocks of odd number run their threads backwards: equal images must still give equal bits
    kept = dense(1, 64)
    for tokens, dtype in ((197, torch.bfloat16), (300, torch.bfloat16), (70, torch.float32)):
        qkv, grad = (t.repeat(4, 1) for t in packed(kept, tokens, 1, dtype))
        for result in core(qkv, grad, kept, tokens, 0.125, "cpu"):
            images = result.view(-1, 4, tokens) if result.shape[0] == 1 else result.view(4, -1)
            images = images.transpose(0, 1).flatten(1) if images.dim() == 3 else images
            assert all(torch.equal(images[0], other) for other in images[1:])


@pytest.mark.parametrize(
    ("tokens", "dims", "dtype"),
    [
        (197, 64, torch.bfloat16),
        (300, 64, torch.bfloat16),
        (577, 64, torch.bfloat16),
        (300, 128, torch.float16),
        (198, 24, torch.float32),
    ],
    ids=str,
)
def test_copies_may_land_at_once_or_as_late_as_they_may(tokens, dims, dtype, monkeypatch):
    # A copy that is started too early shows when it lands at once; one that nobody waits for, when late.
    kept = ragged(1, dims, 0.9)
    qkv, grad = packed(kept, tokens, 2, dtype)
    late = core(qkv, grad, kept, tokens, 0.125, "cpu")
    monkeypatch.setenv("UVC_HOST_COPIES", "early")
    assert all(map(torch.equal, late, core(qkv, grad, kept, tokens, 0.125, "cpu")))
    check(kept, tokens, dtype)


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize(
    ("tokens", "heads", "blocks"),
    [(70, 5, 1), (161, 1, 2), (197, 12, 2), (198, 3, 2), (256, 1, 2)],
)
def test_one_block_for_a_head_gives_the_bits_of_several(tokens, heads, blocks, copies, monkeypatch):
    # With few heads, on many multiprocessors, a head's queries are shared out; with many, one block does all.
    monkeypatch.setenv("UVC_HOST_COPIES", copies)
    kept = ragged(heads, 64, 0.9) if heads > 1 else dense(1, 64)
    qkv, grad = packed(kept, tokens, 1, torch.bfloat16)
    results, launched = [], []
    for processors in ("132", "1"):
        monkeypatch.setenv("UVC_HOST_PROCESSORS", processors)
        heads_of, top, inverse = at_the_end(torch.empty_like(grad)), *torch.empty(2, len(kept.table), tokens)
        ops.cuda_attention_core(qkv, kept.table, counts_of(kept), tokens, 0.125, heads_of, top, inverse)
        launched.append(uvc_kernels._C.host_record()[2])
        results.append((heads_of, top, inverse))
    assert all(map(torch.equal, *results))
    assert launched[0] % blocks == 0 and launched[1] == launched[0] // blocks
    exact, usual = (
        plain(qkv, grad, kept, tokens, 0.125, dtype)[0] for dtype in (torch.float64, torch.bfloat16)
    )
    allowed = 2 * (usual.double() - exact).abs().max() + accuracy.FLOOR[torch.bfloat16] * exact.abs().max()
    assert (results[1][0].double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("images", [4, 8])
def test_no_scheduler_has_more_than_its_share_of_many_heads(images, processors, monkeypatch):
    # 197 tokens are seven warps' work: what goes without is another in each of four heads.
    monkeypatch.setenv("UVC_HOST_PROCESSORS", str(processors))
    kept = dense(1, 64)
    qkv, grad = packed(kept, 197, images, torch.bfloat16)
    top, inverse = torch.empty(2, 1, len(qkv))
    uvc_kernels._C.host_record()
    ops.cuda_attention_core(qkv, kept.table, counts_of(kept), 197, 0.125, grad, top, inverse)
    loads, *_, most = uvc_kernels._C.host_record()
    assert most == loads / 4


@pytest.mark.parametrize(("tokens", "dims"), [(577, 64), (197, 32), (197, 128)])
def test_where_not_all_keys_fit_or_nothing_is_gained_several_blocks_do_a_head(tokens, dims, monkeypatch):
    monkeypatch.setenv("UVC_HOST_PROCESSORS", "1")
    check(dense(1, dims), tokens, torch.bfloat16)
    kept = dense(1, dims)
    qkv, grad = packed(kept, tokens, 1, torch.bfloat16)
    top, inverse = torch.empty(2, 1, tokens)
    ops.cuda_attention_core(qkv, kept.table, counts_of(kept), tokens, 0.125, grad, top, inverse)
    assert uvc_kernels._C.host_record()[2] > 1


@pytest.mark.parametrize("tokens", [17, 70])
def test_the_products_of_float32_are_those_of_its_shuffles(tokens, monkeypatch):
    monkeypatch.setenv("UVC_HOST_PRODUCTS", "shuffles")
    check(ragged(2, 24), tokens, torch.float32)


def test_nan_reaches_its_own_image_only():
    kept = dense(2, 16)
    qkv, grad = packed(kept, 17, 2, torch.float32)
    qkv[20, 3] = float("nan")
    heads, _, _, grad_qkv = core(qkv, grad, kept, 17, 0.25, "cpu")
    assert heads[17:, :16].isnan().any() and not heads[:17].isnan().any() and not grad_qkv[:17].isnan().any()


@pytest.mark.parametrize(("provider", "dtype"), CASES, ids=str)
def test_the_whole_op_is_as_exact_as_plain_torch(provider, dtype):
    device = PROVIDERS[provider]
    kept = ragged(3, 20).to(device)
    shapes = ((2, 50, 24), (180, 24), (180,), (24, 60), (24,))
    inputs = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
    accuracy.check(lambda *t: uvc_kernels.attention(*t, kept, 0.25), inputs, dtype, provider)


def test_gradcheck_and_opcheck_pass():
    kept = ragged(2, 3)
    shapes = ((1, 3, 2), (18, 2), (18,), (2, 6), (2,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    attend = accuracy.forced("cuda-host", lambda *t: uvc_kernels.attention(*t, kept, 0.5))
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    packs = (
        leaves[1].detach().new_empty(len(kept.rows), 2).normal_(),
        None,
        leaves[3].detach().new_empty(2, len(kept.columns)).normal_(),
    )
    op = ops.attend_cuda_host.default
    given = (kept.qk, kept.v, kept.table, *kept[-4:], 0.5, False)
    torch.library.opcheck(op, (leaves[0], *packs, leaves[4], *given))


class Names(TorchDispatchMode):
    """Notes which of our ops run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func._opname] * (func.namespace == "uvc_kernels")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_way_past_the_library_gives_the_same_bits(grad, recompute):
    kept = ragged(3, 20)
    shapes = ((2, 17, 24), (180, 24), (180,), (24, 60), (24,))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    leaves[2].requires_grad_(False)

    def run():
        with uvc_kernels.backend("cuda-host"), torch.set_grad_enabled(grad):
            out = uvc_kernels.attention(*leaves, kept, 0.25, recompute=recompute)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), wanted) if grad else ())]

    past = run()
    with Names() as seen:
        through = run()
    assert "attend_cuda_host" in seen.names and ("attend_backward_cuda_host" in seen.names) == grad
    assert all(map(torch.equal, past, through))


def test_a_second_derivative_is_refused_on_the_way_past_the_library():
    kept, x = ragged(2, 8), torch.randn(1, 5, 6, requires_grad=True)
    weights = torch.randn(48, 6), None, torch.randn(6, 16), None
    with uvc_kernels.backend("cuda-host"):
        out = uvc_kernels.attention(x, *weights, kept, 0.25)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_forward_pass_makes_one_tensor_as_large_as_qkv(recompute):
    class Large(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.made += isinstance(out, torch.Tensor) and out.shape == (34, S) and not out._is_view()
            return out

    kept = ragged(3, 20)
    S = len(kept.rows)
    x, qkv, proj = torch.randn(2, 17, 6), torch.randn(S, 6), torch.randn(7, len(kept.columns))
    given = (kept.qk, kept.v, kept.table, *kept[-4:], 0.5, recompute)
    with Large() as large:
        _attend(cuda._pieces(), x, qkv, None, proj, None, *given)
    assert large.made == 1


def fitting():
    """Arguments of `cuda_attention_core` that fit: two heads of 8 dims in two images of 5 tokens."""
    return {
        "qkv": torch.randn(10, 48),
        "table": dense(2, 8).table,
        "counts": [2, 0, 0, 0],
        "tokens": 5,
        "scale": 1.0,
        "heads": torch.empty(10, 16),
        "top": torch.empty(2, 10),
        "inverse": torch.empty(2, 10),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"qkv": c["qkv"].half()}, "dtype of qkv"),
        (lambda c: c | {"counts": [1, 0, 0, 0]}, "counts"),
        (lambda c: c | {"tokens": 4}, "multiple of the tokens"),
        (lambda c: c | {"table": c["table"].long()}, "int32"),
        (lambda c: c | {"qkv": c["qkv"].t().contiguous().t()}, "contiguous"),
        (lambda c: c | {"top": c["top"].double()}, "statistics"),
        (lambda c: c | {"top": c["top"][:1].contiguous()}, r"\[heads, M\]"),
    ],
    ids=["mixed dtypes", "counts off", "tokens off", "wide table", "strides", "wide statistics", "few heads"],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    with pytest.raises(RuntimeError, match=f"cuda_attention_core: .*{message}"):
        ops.cuda_attention_core(*change(fitting()).values())

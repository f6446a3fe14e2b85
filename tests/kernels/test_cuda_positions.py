"""Positions in csrc/cuda: a bias in every form of the attention core and its gradient, turning in place."""

import accuracy
import pytest
import torch
import uvc_kernels
from on_cuda import CASES, PROVIDERS, at_the_end, fenced, on_every_type, ops, poisoned, statistics  # noqa: F401
from test_cuda_attention import dense, fitting, packed, ragged
from uvc_kernels.indices import align, counts_of

SCALE = 0.125


def padded(bias):
    """As the kernels take it: rows of a multiple of 8 numbers, zeros behind the last."""
    return torch.nn.functional.pad(bias, (0, align(bias.shape[-1]) - bias.shape[-1]))


def core(qkv, grad, kept, tokens, bias, device, to=None, scale=SCALE):
    """What the pieces write: heads, top, inverse, the gradient of qkv, and that of the bias of every head."""
    qkv, grad, bias = qkv.to(device), grad.to(device), padded(bias).to(device)
    table, order, counts = kept.table.to(device), kept.order.to(device), counts_of(kept)
    heads = poisoned(*grad.shape, dtype=qkv.dtype, device=device)
    top, inverse = (
        poisoned(len(table), len(qkv), dtype=statistics(qkv.dtype), device=device) for _ in range(2)
    )
    grad_qkv = poisoned(*qkv.shape, dtype=qkv.dtype, device=device)
    shape = len(bias), len(table), tokens, tokens
    grad_bias = poisoned(*shape, dtype=to or qkv.dtype, device=device)
    ops.cuda_attention_core(qkv, table, counts, tokens, scale, heads, top, inverse, bias, order)
    given = qkv, heads, grad, top, inverse, table, counts, tokens, scale
    ops.cuda_attention_core_backward(*given, grad_qkv, bias, order)
    ops.cuda_bias_gradient(*given, bias, order, grad_bias)
    return [t.cpu() for t in (heads, top, inverse, grad_qkv, grad_bias)]


def plain(qkv, grad, kept, tokens, bias, dtype, scale=SCALE):
    """The same by plain torch in `dtype`: heads, the gradient of qkv, and that of the bias of every head."""
    qkv = qkv.detach().to(dtype, copy=True).requires_grad_()
    every = bias.to(dtype).expand(-1, len(kept.table), -1, -1).detach().clone().requires_grad_()
    heads, images = torch.zeros(grad.shape, dtype=dtype), len(qkv) // tokens
    for (q, k, v, out, qk_width, v_width), h in zip(kept.table.tolist(), kept.order.tolist(), strict=True):
        q, k, v = (
            qkv[:, at : at + width].view(images, tokens, width)
            for at, width in ((q, qk_width), (k, qk_width), (v, v_width))
        )
        added = every[:, h].repeat(images // len(every), 1, 1)
        p = torch.softmax(q @ k.transpose(1, 2) * scale + added, -1)
        heads = heads.index_add(1, torch.arange(out, out + v_width), (p @ v).reshape(len(qkv), v_width))
    heads.backward(grad.to(dtype))
    return heads.detach(), qkv.grad, every.grad


def check(kept, tokens, dtype, provider="cuda-host", images=1, biases=1, one=False, scale=SCALE, shift=0.0):
    qkv, grad = packed(kept, tokens, images, dtype)
    bias = torch.randn(biases, 1 if one else len(kept.table), tokens, tokens).to(dtype) + shift
    exact = plain(qkv, grad, kept, tokens, bias, torch.float64, scale)
    usual = plain(qkv, grad, kept, tokens, bias, dtype, scale)
    heads, _, _, *grads = core(qkv, grad, kept, tokens, bias, PROVIDERS[provider], scale=scale)
    for name, a, b, c in zip(("heads", "qkv", "bias"), (heads, *grads), usual, exact, strict=True):
        error = (a.double() - c).abs().max().nan_to_num(float("inf"))
        allowed = 2 * (b.double() - c).abs().max() + accuracy.FLOOR[dtype] * c.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@on_every_type
@pytest.mark.parametrize("tokens", [2, 17, 63, 197])
def test_a_bias_of_ragged_heads_is_as_exact_as_plain_torch(tokens, provider, dtype):
    check(ragged(2, 64), tokens, dtype, provider)


def test_a_single_token_attends_to_itself_whatever_its_bias():
    kept = dense(2, 16)
    qkv, grad = packed(kept, 1, 3, torch.float32)
    heads, _, _, grad_qkv, grad_bias = core(qkv, grad, kept, 1, torch.randn(3, 2, 1, 1), "cpu")
    assert torch.equal(heads, qkv[:, 64:]) and torch.equal(grad_qkv[:, 64:], grad)
    assert max(grad_qkv[:, :64].abs().max(), grad_bias.abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "dims"), [(241, 64), (300, 24), (70, 128)])
def test_a_bias_is_added_in_every_form(tokens, dims, dtype):
    check(dense(1, dims), tokens, dtype)


@on_every_type
@pytest.mark.parametrize("one", [False, True], ids=["a bias of each head", "one bias for all heads"])
@pytest.mark.parametrize(("images", "biases"), [(4, 1), (4, 2), (3, 3)])
def test_images_share_biases_and_their_gradients(images, biases, one, provider, dtype):
    check(ragged(3, 24), 19, dtype, provider, images, biases, one)


def test_a_bias_stays_with_its_head_where_the_narrow_heads_come_first():
    qk, v = torch.zeros(4, 96, dtype=torch.bool), torch.zeros(4, 96, dtype=torch.bool)
    for head, (q_dims, v_dims) in enumerate([(96, 70), (9, 0), (5, 30), (0, 3)]):
        qk[head, :q_dims], v[head, 96 - v_dims :] = True, True
    kept = uvc_kernels.kept_heads(qk, v)
    assert kept.order.tolist() == [2, 1, 0]
    for dtype in (torch.float32, torch.float16):
        check(kept, 33, dtype, images=2, biases=2)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0], ids=["negative", "zero", "sharp"])
def test_any_scale_is_fine_beside_a_bias(scale):
    check(dense(2, 32), 50, torch.float32, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [70, 300], ids=["whole head", "streaming"])
def test_a_bias_far_below_zero_leaves_no_weight_behind_the_last_key(tokens, dtype):
    # Behind the last key there is no bias: that key, or that query, would have a weight of e^200.
    check(dense(1, 16), tokens, dtype, shift=-200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [70, 300], ids=["whole head", "streaming"])
def test_forbidden_keys_get_neither_weight_nor_gradient(tokens, dtype):
    kept = dense(1, 24)
    qkv, grad = packed(kept, tokens, 1, dtype)
    bias = torch.randn(1, 1, tokens, tokens).to(dtype)
    bias[..., : tokens // 2] = float("-inf")
    heads, _, _, *grads = core(qkv, grad, kept, tokens, bias, "cpu")
    exact = plain(qkv, grad, kept, tokens, bias, torch.float64)
    for found, wanted in zip((heads, *grads), exact, strict=True):
        assert (found - wanted).abs().max() <= 10 * accuracy.FLOOR[dtype] * wanted.abs().max()
    assert not grads[1][..., : tokens // 2].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [68, 300], ids=["whole head", "streaming"])
def test_nothing_is_touched_behind_a_tensor(tokens, dtype):
    # Each ends where memory ends: what touches a byte more ends the process.
    kept = dense(1, 24)
    qkv, grad = map(at_the_end, packed(kept, tokens, 1, dtype))
    bias = torch.randn(1, 1, tokens, tokens).to(dtype)
    heads, grad_qkv = at_the_end(torch.empty_like(grad)), at_the_end(torch.empty_like(qkv))
    top, inverse = (at_the_end(torch.empty(1, tokens)) for _ in range(2))
    table, order, counts = at_the_end(kept.table), at_the_end(kept.order), counts_of(kept)
    added, grad_bias = at_the_end(padded(bias)), at_the_end(torch.empty_like(bias))
    ops.cuda_attention_core(qkv, table, counts, tokens, SCALE, heads, top, inverse, added, order)
    given = qkv, heads, grad, top, inverse, table, counts, tokens, SCALE
    ops.cuda_attention_core_backward(*given, grad_qkv, added, order)
    ops.cuda_bias_gradient(*given, added, order, grad_bias)
    found = heads, top, inverse, grad_qkv, grad_bias
    assert all(map(torch.equal, found, core(qkv, grad, kept, tokens, bias, "cpu")))


def test_the_bias_gradient_is_written_in_the_dtype_of_the_bias_and_repeats(monkeypatch):
    kept = ragged(2, 24, 0.9)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        qkv, grad = packed(kept, 37, 6, dtype)
        bias = torch.randn(2, 1, 37, 37).to(dtype)
        wide = core(qkv, grad, kept, 37, bias, "cpu", torch.float32)[4]
        monkeypatch.setenv("UVC_HOST_COPIES", "early")
        for to in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(core(qkv, grad, kept, 37, bias, "cpu", to)[4], wide.to(to))
        monkeypatch.delenv("UVC_HOST_COPIES")


def test_the_products_of_float32_are_those_of_its_shuffles(monkeypatch):
    monkeypatch.setenv("UVC_HOST_PRODUCTS", "shuffles")
    check(ragged(2, 24), 17, torch.float32)


def turning_case(tokens, images, tables, dims=24, layout="halves", dtype=torch.float32):
    """What is kept of four heads, packed numbers, partners, and tables [2, I, G, K, N up to 16]."""
    partner = torch.arange(dims).roll(dims // 2) if layout == "halves" else torch.arange(dims) ^ 1
    if layout == "some":
        partner[dims // 2 :] = torch.arange(dims // 2, dims)
    kept = ragged(4, dims)
    qk = kept.whole_rows[0] >= 0
    kept = uvc_kernels.kept_heads(qk & qk[:, partner], torch.rand(4, dims) < 0.6)
    angles = torch.randn(*tables, tokens - 1, dims, dtype=torch.float64)
    sine, cosine = angles.sin(), angles.cos()
    if layout == "some":
        sine[..., dims // 2 :], cosine[..., dims // 2 :] = 0, 1
    turn = uvc_kernels.turn_of(sine, cosine, partner, 1)
    qkv = torch.randn(images * tokens, len(kept.rows), dtype=torch.float64)
    return kept, qkv.to(dtype), partner, turn


def turned(qkv, kept, tokens, partner, turn, back):
    """By plain float64 numbers, column by column; what belongs to no q/k dim stays."""
    out, (H, K) = qkv.double().clone(), kept.whole_columns.shape
    image = torch.arange(len(qkv)) // tokens % turn.shape[1]
    token = torch.arange(len(qkv)) % tokens
    for part, h, dim in ((part, h, dim) for part in (0, 1) for h in range(H) for dim in range(K)):
        column, other = (int(kept.whole_rows[part, h, d]) for d in (dim, partner[dim]))
        if column >= 0:
            at = h if turn.shape[2] > 1 else 0
            cosine = turn[0, image, at, dim, token].double()
            sine = turn[1, image, at, partner[dim] if back else dim, token].double()
            out[:, column] = qkv[:, column].double() * cosine + qkv[:, other].double() * sine
    return out


TURNED = [
    (17, 5, (1, 1), "halves"),
    (9, 2, (2, 4), "neighbours"),
    (40, 3, (3, 1), "halves"),
    (33, 9, (1, 4), "neighbours"),
    (5, 2, (1, 1), "some"),
]


@on_every_type
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize(("tokens", "images", "tables", "layout"), TURNED)
def test_q_and_k_are_turned_in_place_and_nothing_else(tokens, images, tables, layout, back, provider, dtype):
    device = PROVIDERS[provider]
    for of_tables in dict.fromkeys((dtype, torch.float32)):
        kept, qkv, partner, turn = turning_case(tokens, images, tables, layout=layout, dtype=dtype)
        turn = turn.to(of_tables)
        exact = turned(qkv, kept, tokens, partner, turn, back)
        found = poisoned(*qkv.shape, dtype=dtype, device=device).copy_(qkv)
        lists = (t.to(device) for t in (kept.table, kept.rows, kept.whole_rows, partner, turn))
        table, *given = lists
        ops.cuda_turn(found, table, counts_of(kept), tokens, *given, back)
        # One rounding of the result; float32 also rounds its two products.
        accurate = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.cpu().double(), exact, rtol=accurate, atol=accurate)
        untouched = (kept.rows < 0) | (torch.arange(len(kept.rows)) >= kept.table[:, 2].min())
        assert torch.equal(found.cpu()[:, untouched], qkv[:, untouched])


def test_turning_back_is_the_transpose_of_turning():
    kept, qkv, partner, turn = turning_case(21, 2, (1, 4), dtype=torch.float64)
    other = torch.randn_like(qkv)
    given = kept.table, counts_of(kept), 21, kept.rows, kept.whole_rows, partner, turn
    there, back = qkv.clone(), other.clone()
    ops.cuda_turn(there, *given, False)
    ops.cuda_turn(back, *given, True)
    torch.testing.assert_close((there * other).sum(), (qkv * back).sum())


@pytest.mark.parametrize(("tokens", "images", "tables", "layout"), TURNED)
def test_turning_touches_nothing_behind_a_tensor(tokens, images, tables, layout):
    kept, qkv, partner, turn = turning_case(tokens, images, tables, layout=layout)
    exact = turned(qkv, kept, tokens, partner, turn, False)
    found, table, rows, whole_rows, partner, turn = (
        at_the_end(t) for t in (qkv, kept.table, kept.rows, kept.whole_rows, partner, turn.float())
    )
    ops.cuda_turn(found, table, counts_of(kept), tokens, rows, whole_rows, partner, turn, False)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"bias": c["bias"].half()}, "dtype of qkv"),
        (lambda c: c | {"bias": c["bias"][..., :5].contiguous()}, "a divisor of the images, heads or 1"),
        (lambda c: c | {"bias": c["bias"].repeat(3, 1, 1, 1)}, "a divisor of the images, heads or 1"),
        (lambda c: c | {"bias": c["bias"].repeat(1, 3, 1, 1)}, "a divisor of the images, heads or 1"),
        (lambda c: c | {"bias": c["bias"].transpose(2, 3).contiguous().transpose(2, 3)}, "contiguous"),
        (lambda c: c | {"order": None}, "a bias comes with its order"),
        (lambda c: c | {"order": c["order"].long()}, "order must be int32"),
    ],
    ids=["mixed dtypes", "not padded", "many biases", "many heads", "strides", "no order", "wide order"],
)
def test_a_bias_that_does_not_fit_is_one_clear_line(change, message):
    case = fitting() | {"bias": torch.zeros(1, 1, 5, 8), "order": dense(2, 8).order}
    with pytest.raises(RuntimeError, match=f"cuda_attention_core: .*{message}"):
        ops.cuda_attention_core(*change(case).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"tokens": 4}, "multiple of the tokens"),
        (lambda c: c | {"counts": [1, 0, 0, 0]}, "counts"),
        (lambda c: c | {"rows": c["rows"][:-1].contiguous()}, "columns of qkv"),
        (lambda c: c | {"whole_rows": c["whole_rows"].long()}, "must be int32"),
        (lambda c: c | {"partner": c["partner"].int()}, "partner must be int64"),
        (lambda c: c | {"tables": c["tables"][..., :5].contiguous()}, "up to a multiple of 16"),
        (lambda c: c | {"tables": c["tables"].repeat(1, 3, 1, 1, 1)}, "images or 1"),
        (lambda c: c | {"qkv": c["qkv"].t().contiguous().t()}, "contiguous"),
        (lambda c: c | {"qkv": c["qkv"].int()}, "float32, bfloat16"),
    ],
    ids=["tokens", "counts", "rows", "whole rows", "partner", "short", "images", "strides", "integers"],
)
def test_tables_that_do_not_fit_are_one_clear_line(change, message):
    kept = dense(4, 24)
    case = {
        "qkv": torch.randn(10, len(kept.rows)),
        "table": kept.table,
        "counts": counts_of(kept),
        "tokens": 5,
        "rows": kept.rows,
        "whole_rows": kept.whole_rows,
        "partner": torch.arange(24) ^ 1,
        "tables": torch.zeros(2, 1, 1, 24, 16),
        "back": False,
    }
    with pytest.raises(RuntimeError, match=f"cuda_turn: .*{message}"):
        ops.cuda_turn(*change(case).values())

"""Positions on Triton: tiles of every kind, heads of several widths, exact zeros, tracing, refusals."""

import warnings

import pytest
import torch
import uvc_kernels
from accuracy import with_gradients
from on_triton import DEVICE, check, forced, interpreted
from oracle import images
from served import made
from test_every_backend import attend_with_positions, numbers, positions_case
from uvc_kernels import Positions, self_check

import uvc

op = torch.ops.uvc_kernels.attend_with_positions_triton.default
backward = torch.ops.uvc_kernels.attend_with_positions_backward_triton.default
BOTH = "tables and a bias"


def everything(dims):
    return torch.ones(2, 3, dims, dtype=torch.bool)


def small_case(placed=BOTH, tokens=5, dims=8):
    return positions_case(placed, tokens, DEVICE, dims, everything(dims) & (torch.arange(dims) % 8 < 6))


@pytest.mark.parametrize(
    ("tokens", "dims", "dtype"),
    [
        (35, 64, torch.float32),
        (65, 16, torch.bfloat16),
        (130, 32, torch.bfloat16),
        (70, 128, torch.bfloat16),
        pytest.param(209, 64, torch.float16, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        pytest.param(300, 64, torch.bfloat16, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
    ids=str,
)
def test_every_kind_of_tile_is_right(tokens, dims, dtype):
    tensors, kept, positions = positions_case(BOTH, tokens, DEVICE, dims, everything(dims))
    tensors[0], tensors[5] = tensors[0][:2], tensors[5][:1]
    check(attend_with_positions(kept, positions), tensors, dtype)


def test_a_bias_stays_with_its_head_where_the_narrow_heads_come_first():
    qk, v = torch.zeros(3, 64, dtype=torch.bool), torch.zeros(3, 64, dtype=torch.bool)
    for head, (qk_dims, v_dims) in enumerate([(64, 40), (4, 3), (0, 20)]):
        qk[head, :qk_dims], v[head, :v_dims] = True, True
    tensors, kept, positions = positions_case(BOTH, 17, DEVICE, keep=(qk, v))
    assert kept.order.tolist() == [1, 2, 0]
    check(attend_with_positions(kept, positions), tensors, torch.float32)


@pytest.mark.parametrize("tokens", [17, 70], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_a_bias_forbids_get_nothing(tokens, dtype):
    tensors, kept, positions = small_case("a bias of each head", tokens)
    tensors = [t.to(dtype) for t in tensors]
    # The first half and one more, so that whole tiles of keys are forbidden.
    tensors[5][..., : tokens // 2 + 1] = float("-inf")
    results = {}
    for name in ("triton", "reference"):
        with uvc_kernels.backend(name):
            results[name] = with_gradients(attend_with_positions(kept, positions), tensors)
    for found, exact in zip(results["triton"], results["reference"], strict=True):
        assert (found - exact).abs().max() <= 3 * self_check.FLOOR[dtype] * exact.abs().max()
    assert not results["triton"][6][..., : tokens // 2 + 1].count_nonzero()


def test_under_autocast_the_bias_and_its_gradient_stay_float32():
    tensors, kept, positions = small_case("a bias of each head", 17)
    tensors = [t.float() for t in tensors]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = with_gradients(forced(attend_with_positions(kept, positions)), tensors)
    with uvc_kernels.backend("reference"):
        exact = with_gradients(attend_with_positions(kept, positions), [t.double() for t in tensors])
    assert found[6].dtype == torch.float32
    assert (found[6] - exact[6]).abs().max() <= 0.05 * exact[6].abs().max()


def test_without_kept_heads_the_bias_of_the_output_is_left():
    tensors, kept, positions = positions_case(BOTH, 5, DEVICE, 8, torch.zeros(2, 3, 8, dtype=torch.bool))
    tensors = [*(t.float() for t in tensors[:5]), torch.zeros(1, 0, 5, 5, device=DEVICE)]
    found = with_gradients(forced(attend_with_positions(kept, positions)), tensors)
    assert torch.equal(found[0], tensors[4].expand_as(found[0])) and found[6].shape == (1, 0, 5, 5)
    assert not any(t.count_nonzero() for t in found[1:5])


def test_nothing_is_read_from_the_device(monkeypatch):
    tensors, kept, positions = small_case()
    tensors = [t.float() for t in tensors]
    expected = with_gradients(forced(attend_with_positions(kept, positions)), tensors)

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    for name in ("tolist", "item", "cpu", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = forced(attend_with_positions(kept, positions))(*leaves)
    out.backward(torch.ones_like(out))
    monkeypatch.undo()
    assert torch.equal(out, expected[0]) and all(leaf.grad is not None for leaf in leaves)


@interpreted
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck_passes(recompute):
    (x, _, _, _, _, bias), kept, positions = small_case()
    S, V = len(kept.rows), len(kept.columns)
    x, *weights = x[:, :, :6], *numbers((S, 6), S, (7, V), 7, device=DEVICE)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights, bias)]
    lists = kept.qk, kept.v, kept.table, *kept[-4:], kept.order, kept.rows, kept.whole_rows
    given = (*lists, positions.turn, positions.partner, 0.5, recompute)
    torch.library.opcheck(op, (*leaves, *given))
    tensors = [t.detach() for t in leaves]
    out, *saved = op(*tensors, *given)
    for needs in (0b111111, 0b100000, 0b001001):
        torch.library.opcheck(backward, (torch.ones_like(out), *tensors, *given, *saved, needs))


@interpreted
@pytest.mark.parametrize("placed", ["one bias for all heads", BOTH])
def test_gradcheck_passes(placed):
    tensors, kept, positions = small_case(placed, tokens=3)
    tensors = [t[..., :2] if i < 2 else t[:2] if i in (3, 4) else t for i, t in enumerate(tensors)]
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    run = forced(attend_with_positions(kept, positions))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_heads_of_more_than_128_dims_are_not_served_and_that_is_known(monkeypatch):
    monkeypatch.setattr("uvc_kernels._dispatch._proven", lambda *_: True)
    dims = 136
    tensors, kept, _ = positions_case("a bias of each head", 5, DEVICE, dims, everything(dims))
    device, name = torch.device(DEVICE), "attention_with_positions"
    narrow = small_case()[1]
    with uvc_kernels.backend("triton"):
        assert uvc_kernels.kernel_serves(name, device, torch.float32, narrow)
        assert not uvc_kernels.kernel_serves(name, device, torch.float32, kept)
        with pytest.raises(ValueError, match="more than 128 dims"):
            attend_with_positions(kept, Positions())(*(t.float() for t in tensors))


@pytest.mark.parametrize("name", ["eva02", "beit", "swin"])
@pytest.mark.filterwarnings("error:.*plain torch")
def test_layers_with_positions_run_in_the_kernel(name, monkeypatch):
    monkeypatch.setattr("uvc_kernels._dispatch._proven", lambda *_: True)
    model = made(name).to(DEVICE)
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=2))
    x, grads = images(model).to(DEVICE), []
    for backend in ("triton", "reference"):
        monkeypatch.setattr("uvc_kernels.warn_once.said", set())
        with uvc_kernels.backend(backend), warnings.catch_warnings():
            if backend == "reference":
                warnings.simplefilter("ignore")
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, exact in zip(*grads, strict=True):
        assert (found - exact).abs().max() <= 2e-4 * exact.abs().max().clamp_min(1e-6)

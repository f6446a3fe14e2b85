"""Positions on the backends that pack: heads of several widths, forbidden keys, zeros, tracing, refusals."""

import warnings

import pytest
import torch
import uvc_kernels
from accuracy import check, forced, with_gradients
from backends import BACKENDS, GPU, case
from oracle import images
from served import made
from test_every_backend import attend_with_positions, numbers, positions_case
from uvc_kernels import Positions, self_check
from uvc_kernels.packed import attention_with_positions

import uvc

BOTH = "tables and a bias"
PACKING = ("triton", "cuda", "cuda-host")
on_packing_backends = pytest.mark.parametrize("backend", [case(name) for name in PACKING])
# Those that take float64, so that gradients can be checked by differences.
on_the_cpu = pytest.mark.parametrize(
    "backend", [case(name) for name in ("cuda-host", *["triton"] * (not GPU))]
)


def everything(dims):
    return torch.ones(2, 3, dims, dtype=torch.bool)


def small_case(backend, placed=BOTH, tokens=5, dims=8):
    keep = everything(dims) & (torch.arange(dims) % 8 < 6)
    return positions_case(placed, tokens, BACKENDS[backend], dims, keep)


@on_packing_backends
def test_a_bias_stays_with_its_head_where_the_narrow_heads_come_first(backend):
    qk, v = torch.zeros(3, 64, dtype=torch.bool), torch.zeros(3, 64, dtype=torch.bool)
    for head, (qk_dims, v_dims) in enumerate([(64, 40), (4, 3), (0, 20)]):
        qk[head, :qk_dims], v[head, :v_dims] = True, True
    tensors, kept, positions = positions_case(BOTH, 17, BACKENDS[backend], keep=(qk, v))
    assert kept.order.tolist() == [1, 2, 0]
    check(attend_with_positions(kept, positions), tensors, torch.float32, backend)


@on_packing_backends
@pytest.mark.parametrize("tokens", [17, 70], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_a_bias_forbids_get_nothing(tokens, dtype, backend):
    tensors, kept, positions = small_case(backend, "a bias of each head", tokens)
    tensors = [t.to(dtype) for t in tensors]
    # The first half and one more, so that whole tiles of keys are forbidden.
    tensors[5][..., : tokens // 2 + 1] = float("-inf")
    results = {}
    for name in (backend, "reference"):
        with uvc_kernels.backend(name):
            results[name] = with_gradients(attend_with_positions(kept, positions), tensors)
    for found, exact in zip(results[backend], results["reference"], strict=True):
        assert (found - exact).abs().max() <= 3 * self_check.FLOOR[dtype] * exact.abs().max()
    assert not results[backend][6][..., : tokens // 2 + 1].count_nonzero()


@on_packing_backends
def test_under_autocast_the_bias_and_its_gradient_stay_float32(backend):
    tensors, kept, positions = small_case(backend, "a bias of each head", 17)
    tensors = [t.float() for t in tensors]
    with torch.autocast(BACKENDS[backend], torch.bfloat16):
        found = with_gradients(forced(backend, attend_with_positions(kept, positions)), tensors)
    with uvc_kernels.backend("reference"):
        exact = with_gradients(attend_with_positions(kept, positions), [t.double() for t in tensors])
    assert found[6].dtype == torch.float32
    assert (found[6] - exact[6]).abs().max() <= 0.05 * exact[6].abs().max()


@on_packing_backends
def test_without_kept_heads_the_bias_of_the_output_is_left(backend):
    device, none = BACKENDS[backend], torch.zeros(2, 3, 8, dtype=torch.bool)
    tensors, kept, positions = positions_case(BOTH, 5, device, 8, none)
    tensors = [*(t.float() for t in tensors[:5]), torch.zeros(1, 0, 5, 5, device=device)]
    found = with_gradients(forced(backend, attend_with_positions(kept, positions)), tensors)
    assert torch.equal(found[0], tensors[4].expand_as(found[0])) and found[6].shape == (1, 0, 5, 5)
    assert not any(t.count_nonzero() for t in found[1:5])


@on_packing_backends
def test_nothing_is_read_from_the_device(backend, monkeypatch):
    tensors, kept, positions = small_case(backend)
    tensors = [t.float() for t in tensors]
    expected = with_gradients(forced(backend, attend_with_positions(kept, positions)), tensors)

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    for name in ("tolist", "item", "cpu", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = forced(backend, attend_with_positions(kept, positions))(*leaves)
    out.backward(torch.ones_like(out))
    monkeypatch.undo()
    assert torch.equal(out, expected[0]) and all(leaf.grad is not None for leaf in leaves)


@on_the_cpu
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck_passes(recompute, backend):
    op, backward = (
        getattr(torch.ops.uvc_kernels, f"attend_with_positions{way}_{backend.replace('-', '_')}").default
        for way in ("", "_backward")
    )
    (x, _, _, _, _, bias), kept, positions = small_case(backend)
    S, V = len(kept.rows), len(kept.columns)
    x, *weights = x[:, :, :6], *numbers((S, 6), S, (7, V), 7)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights, bias)]
    lists = kept.qk, kept.v, kept.table, *kept[-4:], kept.order, kept.rows, kept.whole_rows
    given = (*lists, positions.turn, positions.partner, 0.5, recompute)
    torch.library.opcheck(op, (*leaves, *given))
    tensors = [t.detach() for t in leaves]
    out, *saved = op(*tensors, *given)
    for needs in (0b111111, 0b100000, 0b001001):
        torch.library.opcheck(backward, (torch.ones_like(out), *tensors, *given, *saved, needs))


@on_the_cpu
@pytest.mark.parametrize("placed", ["one bias for all heads", BOTH])
def test_gradcheck_passes(placed, backend):
    tensors, kept, positions = small_case(backend, placed, tokens=3)
    tensors = [t[..., :2] if i < 2 else t[:2] if i in (3, 4) else t for i, t in enumerate(tensors)]
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    run = forced(backend, attend_with_positions(kept, positions))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@on_packing_backends
def test_heads_of_more_than_128_dims_are_not_served_and_that_is_known(backend, monkeypatch):
    monkeypatch.setattr("uvc_kernels._dispatch._proven", lambda *_: True)
    dims = 136
    tensors, kept, _ = positions_case("a bias of each head", 5, BACKENDS[backend], dims, everything(dims))
    device, name = torch.device(BACKENDS[backend]), "attention_with_positions"
    narrow = small_case(backend)[1]
    with uvc_kernels.backend(backend):
        assert uvc_kernels.kernel_serves(name, device, torch.float32, narrow)
        assert not uvc_kernels.kernel_serves(name, device, torch.float32, kept)
        with pytest.raises(ValueError, match="more than 128 dims"):
            attend_with_positions(kept, Positions())(*(t.float() for t in tensors))


@on_packing_backends
@pytest.mark.parametrize("name", ["eva02", "beit", "swin"])
@pytest.mark.filterwarnings("error:.*plain torch")
def test_layers_with_positions_run_in_the_kernel(name, backend, monkeypatch):
    monkeypatch.setattr("uvc_kernels._dispatch._proven", lambda *_: True)
    model = made(name).to(BACKENDS[backend])
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=2))
    x, grads = images(model).to(BACKENDS[backend]), []
    for provider in (backend, "reference"):
        monkeypatch.setattr("uvc_kernels.warn_once.said", set())
        with uvc_kernels.backend(provider), warnings.catch_warnings():
            if provider == "reference":
                warnings.simplefilter("ignore")
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, exact in zip(*grads, strict=True):
        assert (found - exact).abs().max() <= 2e-4 * exact.abs().max().clamp_min(1e-6)


@on_packing_backends
def test_tables_in_float64_are_read_in_float32_as_no_kernel_of_a_gpu_takes_them(backend, monkeypatch):
    seen, placed = [], attention_with_positions._Placed
    turn = placed.turn_

    def seen_turn(self, *given, **options):
        seen.append(self.turn.dtype)
        turn(self, *given, **options)

    monkeypatch.setattr(placed, "turn_", seen_turn)
    tensors, kept, positions = small_case(backend, "one table")
    assert positions.turn.dtype == torch.float64
    with uvc_kernels.backend(backend):
        with_gradients(attend_with_positions(kept, positions), [t.bfloat16() for t in tensors])
    assert set(seen) == {torch.float32}

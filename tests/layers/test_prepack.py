"""Weights of all layers packed in one launch: counted, equal to packing one by one, never stale."""

import copy

import pytest
import timm
import torch
import uvc_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from uvc_kernels import autotune, cuda
from uvc_kernels.packed.attention import _attend, _attend_backward

import uvc

BACKEND = "cuda-host"


class Launches(TorchDispatchMode):
    """Names of our ops in the order in which they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "uvc_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def vit(keep=0.5):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=3)
    uvc.apply_structure(model, uvc.Structure.random(model, keep=keep, seed=0))
    return model


def step(model, x):
    """Output and all gradients, and the ops that ran, by the backend that packs."""
    with uvc_kernels.backend(BACKEND), Launches() as launches:
        out = model(x)
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())], launches.names


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


def test_a_step_packs_all_layers_in_one_launch_and_spreads_gradients_in_another(x):
    _, names = step(vit(), x)
    assert names.count("gather_cuda_host") == 2 and names.count("attend_cuda_host") == 3


def test_packing_together_and_one_by_one_give_the_same_bits(x, monkeypatch):
    together, _ = step(vit(), x)
    monkeypatch.setattr("uvc.layers.prepack._several_processes", lambda: True)
    apart, names = step(vit(), x)
    assert names.count("gather_cuda_host") == 12
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_both_equal_the_reference(x):
    with uvc_kernels.backend("reference"):
        model = vit()
        model(x).square().sum().backward()
    found, _ = step(vit(), x)
    for a, b in zip(found[1:], [p.grad for p in model.parameters()], strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_new_weights_are_packed_anew(x):
    model = vit()
    step(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        with uvc_kernels.backend("reference"):
            expected = model(x)
        with uvc_kernels.backend(BACKEND):
            assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pass_that_fails_leaves_no_packed_weights_behind(x):
    model = vit()
    with uvc_kernels.backend(BACKEND):
        handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
    assert all(half._packed is None for block in model.blocks for half in (block.attn, block.mlp))


def test_skipped_and_dense_halves_are_not_packed(x):
    model = vit()
    model.blocks[0].set_skip(True, False)
    model.blocks[1].mlp.set_kept(None)
    with uvc_kernels.backend(BACKEND):
        seen = []
        model.blocks[2].register_forward_pre_hook(
            lambda *_: seen.extend(h._packed is not None for b in model.blocks for h in (b.attn, b.mlp))
        )
        model(x)
    assert seen == [False, True, True, False, True, True]


def test_the_cpu_kernels_pack_inside_and_a_compacted_model_has_no_hooks(x):
    model = vit()
    with Launches() as launches:
        model(x)
    assert not any("gather" in name for name in launches.names)
    assert not uvc.compact(model).blocks._forward_pre_hooks


def test_what_serves_without_packed_weights_is_not_packed_from_the_second_pass_on(x, monkeypatch):
    model, run_of = vit(), autotune._run_of

    def chosen(op, arguments, *_, **settings):
        return run_of(op, "dense" if op == "mlp" else BACKEND)

    monkeypatch.setattr(autotune, "choose", chosen)
    sizes = []
    plain = uvc_kernels.gather

    def gather(sources, *rest):
        sizes.append(len(sources))
        return plain(sources, *rest)

    monkeypatch.setattr(uvc_kernels, "gather", gather)
    with uvc_kernels.backend("reference"):
        expected = model(x)
    with uvc_kernels.backend(BACKEND):
        for _ in range(3):
            assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    # first all six halves, with four and six entries; then the attention halves alone
    assert sizes == [3 * 4 + 3 * 6, 3 * 4, 3 * 4]


def test_where_nothing_is_read_nothing_is_packed(x, monkeypatch):
    model, run_of = vit(), autotune._run_of
    monkeypatch.setattr(autotune, "choose", lambda op, *_, **settings: run_of(op, "dense"))
    monkeypatch.setattr(uvc_kernels, "gather", lambda *_: 1 / 0)
    with uvc_kernels.backend(BACKEND):
        model(x)


def test_no_bias_is_cast_by_itself_and_all_of_a_half_are_summed_in_one_launch():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._opname in ("sum", "_to_copy", "cuda_column_sums"):
                self.names.append(func._opname)
            return func(*args, **(kwargs or {}))

    attention = vit().blocks[0].attn
    kept, x = attention.kept(torch.device("cpu")), torch.randn(2, 5, 24).bfloat16()
    packed = uvc_kernels.gather(*attention.packing(), torch.bfloat16)
    assert {t.dtype for t in packed} == {torch.bfloat16}
    given = (kept.qk, kept.v, kept.table, *kept[-4:], attention.scale, False)
    with Calls() as calls:
        out, *saved = _attend(cuda._pieces(), x, *packed, *given)
        _attend_backward(cuda._pieces(), out, x, *packed, *given, *saved, 31)
    assert calls.names == ["cuda_column_sums"]


def test_converting_and_copying_again_packs_once(x):
    model = uvc.convert(copy.deepcopy(uvc.convert(vit())))
    assert len(model.blocks._forward_pre_hooks) == 1
    assert step(model, x)[1].count("gather_cuda_host") == 2


def test_under_autocast_float32_weights_are_cast_while_they_are_packed(x):
    model = vit()
    with torch.autocast("cpu", torch.bfloat16):
        with uvc_kernels.backend(BACKEND), Launches() as launches:
            found = model(x)
        with uvc_kernels.backend("reference"):
            expected = model(x)
    assert launches.names.count("gather_cuda_host") == 1
    assert (found - expected).norm() < 2e-2 * expected.norm()
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())

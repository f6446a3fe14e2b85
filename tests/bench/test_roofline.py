"""The work that benchmarks count: against torch's flop counter, sums by hand, and known caps."""

import copy

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import uvc
from uvc.bench.ceilings import Ceilings
from uvc.bench.roofline import (
    Kept,
    Pass,
    Shape,
    attention_backward,
    everything,
    kept_of,
    layer_work,
    model_work,
    product,
    shape_of,
    solver_work,
)
from uvc.costs import flop_counter
from uvc.solver.param_groups import Groups

H200 = Ceilings(790e3, ((1 << 40, 4300.0),))


def counted(model, images, training):
    """FLOPs by torch, with plain products in attention, whose backward pass has stored scores."""
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        if training:
            model.train()(images).sum().backward()
        else:
            with torch.no_grad():
                model.eval()(images)
    return counter.get_total_flops()


def scores_again(shape, kept):
    """What the backward pass recomputes and the flop counter, with stored scores, does not see."""
    M = shape.batch * shape.tokens
    return sum(2 * M * shape.tokens * layer.qk for layer in kept)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", depth=2)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1])
def test_flops_equal_what_torch_counts(dense, keep, training):
    fly = uvc.apply_structure(copy.deepcopy(dense), uvc.Structure.random(dense, keep))
    kept = tuple(kept_of(block) for block in uvc.structure_of(fly).blocks)
    shape = shape_of(dense, 3)
    work = model_work(shape, kept, 4, training)
    images = torch.randn(3, 3, 224, 224)
    extra = scores_again(shape, kept) if training else 0
    assert work.flops - extra == counted(uvc.compact(fly), images, training)


def test_flops_of_inference_are_twice_the_macs(dense):
    structure = uvc.Structure.random(dense, 0.3)
    kept = [kept_of(block) for block in structure.blocks]
    assert model_work(shape_of(dense, 1), kept, 4, False).flops == 2 * uvc.costs.cost(dense, structure).macs


def test_a_skipped_half_costs_nothing(dense):
    shape = shape_of(dense, 1)
    nothing = model_work(shape, [Kept(None, None, None)] * 2, 4, True)
    assert nothing == model_work(shape, [], 4, True)


def test_a_product_reads_both_factors_and_writes_its_result_once():
    assert product(3, 5, 7, 2) == Pass(2 * 3 * 5 * 7, 2 * (15 + 35 + 21))


def test_full_size_gradients_are_written_whole():
    shape, kept = Shape(2, 17, 24, 3, 8, 40), Kept(10, 12, 20)
    whole, small = (sum(p.bytes for p in attention_backward(shape, kept, 4, full)) for full in (True, False))
    rows = 2 * kept.qk + kept.v
    assert whole - small == 4 * 24 * (3 * 24 - rows + 24 - kept.v)


def test_the_attention_core_moves_what_a_fused_kernel_must():
    # Per head of 64 dims and 197 tokens: q, k, v and the output forward; backward twice that. bf16.
    shape, kept = Shape(1, 197, 64, 1, 64, 256), Kept(64, 64, 256)
    forward = layer_work("attention", shape, kept, 2, False).passes[1]
    backward = layer_work("attention", shape, kept, 2, True).passes[2]
    assert forward.flops == pytest.approx(9.94e6, rel=1e-3) and forward.bytes == pytest.approx(
        101e3, rel=0.01
    )
    assert backward.flops == pytest.approx(24.8e6, rel=2e-3) and backward.bytes == 2 * forward.bytes


@pytest.mark.parametrize(
    ("dim", "caps"),
    [(192, (1.20, 1.50, 2.00)), (384, (1.26, 1.69, 2.54)), (768, (1.30, 1.84, 3.13))],
    ids=["DeiT-T", "DeiT-S", "DeiT-B"],
)
def test_caps_of_training_on_a_fast_gpu_are_near_those_known(dim, caps):
    shape = Shape(256, 197, dim, dim // 64, 64, 4 * dim, stem=196 * 768 * dim)

    def floor(keep):
        kept = Kept(round(keep * dim), round(keep * dim), round(keep * 4 * dim))
        return model_work(shape, [kept] * 12, 2, True).floor_ms(H200)

    for keep, cap in zip((0.75, 0.5, 0.25), caps, strict=True):
        assert floor(1.0) / floor(keep) == pytest.approx(cap, rel=0.05)


def test_the_solver_goes_over_what_the_model_groups(dense):
    model = uvc.convert(copy.deepcopy(dense))
    groups = Groups(model)
    numbers, gated = (
        sum(part.of(part.parameter).numel() for part in parts) for parts in (groups.parts, groups.gated)
    )
    work = solver_work(shape_of(dense, 1), 2)
    assert work.bytes == 8 * gated + (8 + 4) * numbers and work.flops == 2 * gated + 3 * numbers


def test_a_pass_takes_as_long_as_the_slower_of_arithmetic_and_traffic():
    ceilings = Ceilings(100.0, ((1 << 20, 40.0), (1 << 28, 10.0)))
    assert ceilings.seconds(1e9, 0) == pytest.approx(0.01)
    # What fits a cache may come out of it; more than the largest copy moves at its rate.
    assert ceilings.seconds(0, 1 << 20) == pytest.approx((1 << 20) / 40e9)
    assert ceilings.seconds(0, 1 << 24) == pytest.approx((1 << 24) / 10e9)
    assert ceilings.seconds(0, 1 << 30) == pytest.approx((1 << 30) / 10e9)


def test_ceilings_are_raised_size_by_size():
    low, high = Ceilings(100.0, ((1, 5.0), (2, 9.0))), Ceilings(90.0, ((1, 7.0),))
    assert low.raised(high) == Ceilings(100.0, ((1, 7.0), (2, 9.0)))


def test_everything_keeps_everything(dense):
    assert everything(shape_of(dense, 1)) == kept_of(uvc.Structure.dense(dense).blocks[0])

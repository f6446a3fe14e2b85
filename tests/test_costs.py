"""Costs: the linear formula against torch's flop counter and the parameters of the compacted model."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import MODELS, distilled_198, images, small_vit, structures
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from uvc_kernels import backend as forced

import uvc
from uvc.constraints import limits, reachable
from uvc.costs import Counts, Prices, block_costs, count_macs, counts, flop_counter, prices, total
from uvc.structure import BlockStructure, Structure


def counted_macs(model: torch.nn.Module) -> int:
    """MACs that torch itself counts: of plain products, as it does not count flash attention everywhere."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval().requires_grad_(False)(images(model, 1))
    flops = counter.get_total_flops()
    assert flops % 2 == 0 and flops == 2 * count_macs(model, images(model, 1))
    return flops // 2


def hold(model: torch.nn.Module, structure: Structure) -> None:
    """Formula, flop counter and parameters agree, to the integer."""
    uvc.apply_structure(model, structure)
    small = uvc.compact(model)
    cost = uvc.cost(model)
    assert cost.macs == counted_macs(small)
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert uvc.cost(small) == cost
    for half in ("macs", "params"):
        fixed = prices(model, half).fixed
        assert getattr(cost, half) == fixed + sum(getattr(block, half) for block in cost.blocks)
    for block, b in zip(small.blocks, cost.blocks, strict=True):
        assert b.params == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_cost_is_what_the_compacted_model_counts_and_holds(name):
    for case in structures(MODELS[name]()).values():
        hold(MODELS[name](), case)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.floats(0, 1), st.integers(0, 1000))
def test_cost_of_any_random_structure_is_exact(name, keep, seed):
    model = MODELS[name]()
    hold(model, Structure.random(model, keep, seed))


def test_cost_is_exact_at_198_tokens():
    hold(distilled_198(), Structure.random(distilled_198(), 0.5, seed=4))


def test_cost_of_a_plain_timm_model_is_what_it_counts():
    model = timm.create_model("deit_tiny_patch16_224")
    cost = uvc.cost(model)
    assert cost.macs == counted_macs(model) == 1_253_683_200
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost == uvc.cost(uvc.convert(model))


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def test_cost_is_exact_with_flash_attention_of_any_torch():
    model = small_vit().eval()
    small = uvc.compact(uvc.apply_structure(model, structures(model)["uniform with equal heads"]))
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        small(images(small, 1))
    assert counter.get_flop_counts()["Global"][FLASH] == 2 * sum(2 * 17 * 17 * 3 * 2 for _ in small.blocks)
    assert counter.get_total_flops() == 2 * uvc.cost(small).macs


def test_the_backward_pass_of_flash_attention_counts_five_products():
    q, k, v = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3))
    with flop_counter() as counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * 2 * 3 * 17 * 17 * 8
    assert list(counter.get_flop_counts()["Global"].values()) == [2 * product, 5 * product]


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda-host"])
@pytest.mark.parametrize("name", ["vit", "packed swiglu", "registers, average pool, post-norm blocks"])
def test_a_users_own_flop_counter_sees_the_cost_of_a_model_that_is_pruned_on_the_fly(name, backend):
    model = MODELS[name]().requires_grad_(False).eval()
    for structure in structures(model).values():
        uvc.apply_structure(model, structure)
        # Whatever is dense runs in timm's own layers.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), forced(backend):
            model(images(model, 1))
        assert counter.get_total_flops() == 2 * uvc.cost(model).macs


def test_counting_leaves_every_module_in_its_own_mode():
    model = small_vit().train()
    model.blocks[1].mlp.eval()
    count_macs(model, images(model, 1))
    assert [name for name, m in model.named_modules() if not m.training] == [
        name for name, _ in model.named_modules() if name.startswith("blocks.1.mlp")
    ]


def test_cost_of_a_structure_needs_no_applying():
    model = small_vit()
    structure = Structure.random(model, 0.5)
    assert uvc.costs.cost(model, structure) == uvc.cost(uvc.apply_structure(small_vit(), structure))


def test_cost_does_not_touch_the_model():
    model = small_vit().train()
    uvc.cost(model)
    assert model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_total_is_the_same_for_ints_and_tensors_and_its_gradients_are_the_prices(metric):
    model = small_vit()
    p, n = prices(model, metric), counts(structures(model)["halves skipped in turn"])
    tensors = Counts(*(torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in n))
    cost = total(p, tensors)
    assert (
        int(cost)
        == total(p, n)
        == getattr(uvc.costs.cost(model, structures(model)["halves skipped in turn"]), metric)
    )
    cost.backward()
    attn, mlp = (torch.tensor(c, dtype=torch.float64) for c in (n.attn, n.mlp))
    p = Prices(p.fixed, *(torch.tensor(part) for part in p[1:]))
    assert torch.equal(tensors.qk.grad, attn * p.qk)
    assert torch.equal(tensors.v.grad, attn * p.v)
    assert torch.equal(tensors.neuron.grad, mlp * p.neuron)
    assert torch.equal(tensors.mlp.grad, p.mlp + p.neuron * tensors.neuron.detach())
    assert torch.equal(tensors.attn.grad, p.attn + p.qk * tensors.qk.detach() + p.v * tensors.v.detach())


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_nothing_costs_less_than_the_smallest_reachable_budget(metric):
    model = small_vit()
    reach = next(line for line in reachable(model) if line.metric == metric)
    smallest = reach.skipped
    costs = [getattr(uvc.costs.cost(model, s), metric) for s in structures(model).values()]
    assert min(costs) == smallest * getattr(uvc.cost(model), metric)
    assert 0 < smallest < reach.thin < 1
    limits(model, smallest, metric)
    with pytest.raises(ValueError, match=f"is below {smallest:.4f}, the smallest reachable {metric} budget"):
        limits(model, 0.999 * smallest, metric)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("round_to", [(1, 1), (3, 8)], ids=str)
def test_the_thinnest_structure_costs_what_is_said_to_be_reachable(metric, round_to):
    model, (dims, neurons) = small_vit(), round_to
    kept = ((tuple(range(dims)),),) * 2
    thin = BlockStructure(True, True, (0,), *kept, tuple(range(neurons)))
    reach = next(line for line in reachable(model, round_to=round_to) if line.metric == metric)
    cost = getattr(uvc.costs.cost(model, Structure((thin,) * 3)), metric)
    assert reach.thin == cost / reach.dense == cost / getattr(uvc.cost(model), metric)
    assert f"{metric}: {reach.skipped:.4f} of the dense cost with every block skipped" in str(reach)


def test_blocks_may_cost_differently():
    n = Counts(attn=(1, 0), mlp=(1, 1), qk=(2, 3), v=(5, 7), neuron=(11, 13), heads=(1, 2))
    p = Prices(100, attn=(1, 2), mlp=(3, 4), qk=(5, 6), v=(7, 8), neuron=(9, 10))
    assert block_costs(p, n) == (1 + 5 * 2 + 7 * 5 + 3 + 9 * 11, 4 + 10 * 13)
    tensors = Counts(*(torch.tensor(c, dtype=torch.float64) for c in n))
    assert block_costs(p, tensors).tolist() == list(block_costs(p, n))
    assert total(p, n) == 100 + sum(block_costs(p, n)) == float(total(p, tensors))


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric must be one of macs, params, got 'flops'"):
        prices(small_vit(), "flops")


def test_a_model_without_an_input_size_has_no_cost():
    model = small_vit()
    model.patch_embed.img_size = None
    with pytest.raises(ValueError, match="no input size"):
        uvc.cost(model)

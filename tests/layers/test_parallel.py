"""Blocks of parallel halves whose last product is one: what both halves share of it."""

import copy

import pytest
import torch
from oracle import absent, error, gradient_error, gradients, images, structures
from served import made
from torch import nn

import uvc
from uvc.solver.head_basis import balance_heads
from uvc.solver.param_groups import Groups
from uvc.solver.state import Factors

SHARED = ["parallel halves, one last product", "parallel halves, differential attention"]
pytestmark = pytest.mark.filterwarnings("ignore:Seen")


@pytest.mark.parametrize("name", SHARED)
def test_a_last_product_that_is_more_than_linear_is_called_for_each_half(name):
    model = made(name).double()
    x = images(model, dtype=torch.float64)
    for block in model.blocks:
        for linear in (block.in_proj, block.out_proj):
            linear.register_forward_hook(lambda module, inputs, out: out * 1.5)
    for case in ("random at keep 0.5", "halves skipped in turn", "no heads"):
        structure = structures(model)[case]
        truth = absent(model, structure)(x)
        expected = gradients(model, truth)
        pruned = uvc.apply_structure(copy.deepcopy(model), structure)
        out = pruned(x)
        assert error(out, truth) < 1e-10, case
        assert gradient_error(gradients(pruned, out), expected) < 1e-9, case
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.in_proj has hooks"):
            uvc.compact(pruned)


@pytest.mark.parametrize("name", SHARED)
def test_a_skipped_mlp_takes_the_bias_of_both_and_a_skipped_attention_none(name):
    model, x = uvc.convert(made(name)), torch.randn(2, 5, 32)
    block = model.blocks[0]
    nn.init.zeros_(block.out_proj.weight)
    for attn, mlp, times in ((True, False, 1.0), (False, True, 0.0), (True, True, 0.0)):
        block.set_skip(attn, mlp)
        bias = block.ls(block.out_proj.bias)
        torch.testing.assert_close(block(x) - x, (times * bias).expand_as(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_groups_scale_their_own_columns_of_the_one_last_weight(name):
    model = uvc.convert(made(name))
    groups, before = Groups(model), [b.out_proj.weight.detach().clone() for b in model.blocks]
    norms = groups.norms()
    factors = Factors(torch.ones(2, 4, 8), torch.full((2, 4, 8), 0.5), torch.full((2, 40), 0.25))
    groups.shrink(factors)
    for block, was in zip(model.blocks, before, strict=True):
        A = block.in_split[1]
        assert torch.equal(block.out_proj.weight[:, :A], 0.5 * was[:, :A])
        assert torch.equal(block.out_proj.weight[:, A:], 0.25 * was[:, A:])
    found = groups.norms()
    torch.testing.assert_close(found["v"], 0.25 * norms["v"])
    torch.testing.assert_close(found["neuron"], 0.0625 * norms["neuron"])


def test_heads_in_their_balanced_basis_give_the_same_outputs():
    model = uvc.convert(made("parallel halves, one last product")).double()
    x = images(model, dtype=torch.float64)
    with torch.no_grad():
        before, weight = model(x), model.blocks[0].out_proj.weight.clone()
        balance_heads(model)
        assert (model.blocks[0].out_proj.weight - weight).abs().max() > 0.1
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["parallel halves", *SHARED])
def test_compacting_without_gradients_leaves_no_weight_frozen(name):
    model = made(name)
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=1))
    with torch.no_grad():
        small = uvc.compact(model)
    assert all(parameter.requires_grad for parameter in small.parameters())

"""Groups and weights: norms, first-order importance, shrinking, and death without revival."""

import pytest
import torch
import uvc_kernels
from timm.models.vision_transformer import VisionTransformer

import uvc
from uvc.solver.param_groups import Groups
from uvc.solver.state import Factors, Masks


def small_vit(**options):
    torch.manual_seed(0)
    sizes = dict(
        img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=12, depth=2, num_heads=3, mlp_ratio=1.5
    )
    model = VisionTransformer(**{**sizes, **options}).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return uvc.convert(model)


def loss(model):
    torch.manual_seed(1)
    return torch.nn.functional.cross_entropy(
        model(torch.randn(4, 1, 8, 8).double()), torch.tensor([0, 1, 2, 3])
    )


def test_norms_are_the_joint_squared_norms_of_everything_a_group_owns():
    model = small_vit()
    norms = Groups(model).norms()
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    q, k, v = attn.qkv.weight.square().sum(1).view(3, 3, 4).unbind(0)
    bq, bk, bv = attn.qkv.bias.square().view(3, 3, 4).unbind(0)
    proj = attn.proj.weight.square().sum(0).view(3, 4)
    torch.testing.assert_close(
        norms["qk"][3:], (q + k + bq + bk).float().to(norms["qk"].dtype), check_dtype=False
    )
    torch.testing.assert_close(norms["v"][3:], v + bv + proj, check_dtype=False)
    neuron = mlp.fc1.weight.square().sum(1) + mlp.fc1.bias.square() + mlp.fc2.weight.square().sum(0)
    torch.testing.assert_close(norms["neuron"][1], neuron, check_dtype=False)


def test_norms_are_summed_to_the_last_bit_in_one_order_weights_first():
    # So that a search of one version ends as that of another.
    model = small_vit(num_heads=1, embed_dim=96).float()
    found, attn = Groups(model).norms()["qk"][1], model.blocks[1].attn
    (q, k, _), (bq, bk, _) = attn.qkv.weight.split(96), attn.qkv.bias.split(96)
    one, two, three, four = (uvc_kernels.group_scores([p], [p], [0]) for p in (q, k, bq, bk))
    assert torch.equal(found, one + two + three + four)
    assert not torch.equal(found, one + three + two + four)


def test_first_order_importance_is_the_gradient_of_a_gate_on_the_group():
    model = small_vit()
    groups = Groups(model)
    loss(model).backward()
    first_order = groups.first_order()
    gates = {
        "qk": [torch.ones(12, dtype=torch.float64, requires_grad=True) for _ in range(2)],
        "v": [torch.ones(12, dtype=torch.float64, requires_grad=True) for _ in range(2)],
        "neuron": [torch.ones(18, dtype=torch.float64, requires_grad=True) for _ in range(2)],
    }
    for layer, block in enumerate(model.blocks):
        scale = torch.cat([gates["qk"][layer], torch.ones(12), torch.ones(12)])
        block.attn.qkv.register_forward_hook(lambda m, i, out, s=scale: out * s)
        block.attn.proj.register_forward_pre_hook(lambda m, i, g=gates["v"][layer]: (i[0] * g,))
        block.mlp.fc2.register_forward_pre_hook(lambda m, i, g=gates["neuron"][layer]: (i[0] * g,))
    loss(model).backward()
    for name, pair in gates.items():
        expected = torch.stack([gate.grad for gate in pair]).view_as(first_order[name])
        torch.testing.assert_close(first_order[name], expected, check_dtype=False, rtol=1e-5, atol=1e-7)


def test_first_order_importance_is_zero_where_no_gradient_arrived():
    model = small_vit()
    model.blocks[0].set_skip(True, False)
    loss(model).backward()
    first_order = Groups(model).first_order()
    assert (first_order["v"][:3] == 0).all() and (first_order["v"][3:] != 0).any()
    assert (first_order["neuron"][0] != 0).any()


def random_masks():
    torch.manual_seed(3)
    return Factors(*(torch.rand(shape) < 0.4 for shape in ((2, 3, 4), (2, 3, 4), (2, 18))))


@pytest.mark.parametrize("bias", [True, False], ids=["with biases", "without biases"])
def test_dead_groups_change_nothing_when_skipped_and_a_warm_optimiser_does_not_revive_them(bias):
    model = small_vit(qkv_bias=bias)
    groups = Groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    dead = random_masks()
    groups.clear(dead, optimizer)
    before = loss(model)
    groups.apply(Masks(~dead.qk, ~dead.v, ~dead.neuron, torch.ones(2, 2, dtype=torch.bool)))
    torch.testing.assert_close(loss(model), before, rtol=1e-12, atol=1e-12)
    for _ in range(5):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = groups.norms()
    assert (norms["v"].view(2, 3, 4)[dead.v] == 0).all()
    assert (norms["neuron"][dead.neuron] == 0).all()
    gone = dead.qk | ~(~dead.v).any(-1, keepdim=True)
    assert (norms["qk"].view(2, 3, 4)[dead.qk & gone] == 0).all()


def test_moments_are_cleared_beside_parameters_that_have_none():
    model = small_vit()
    groups = Groups(model)
    model.blocks[0].mlp.fc1.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model).backward()
    optimizer.step()
    dead = random_masks()
    groups.clear(dead, optimizer)
    moment = optimizer.state[model.blocks[1].mlp.fc2.weight]["exp_avg"]
    assert not moment[:, dead.neuron[1]].any() and moment[:, ~dead.neuron[1]].any()


def test_a_segment_is_trainable_with_all_its_parameters_and_reached_with_the_gradient_of_its_gates():
    model = small_vit()
    groups = Groups(model)
    model.blocks[0].attn.proj.weight.requires_grad_(False)
    model.blocks[1].mlp.fc1.bias.requires_grad_(False)
    trainable = {name: flags.tolist() for name, flags in groups.trainable().items()}
    assert trainable == {"qk": [True] * 6, "v": [False] * 3 + [True] * 3, "neuron": [True, False]}
    assert not any(flags.any() for flags in groups.reached().values())
    model.blocks[1].set_skip(True, False)
    loss(model).backward()
    reached = {name: flags.tolist() for name, flags in groups.reached().items()}
    assert reached == {"qk": [True] * 3 + [False] * 3, "v": [False] * 6, "neuron": [True, True]}


def test_without_clearing_its_moments_a_warm_optimiser_does_revive_a_group():
    model = small_vit()
    groups = Groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model).backward()
    optimizer.step()
    dead = random_masks()
    groups.shrink(Factors(*((~mask).double() for mask in dead)))
    optimizer.step()
    assert groups.norms()["neuron"][dead.neuron].min() > 0


def test_shrink_multiplies_norms_by_the_square_of_the_factor():
    model = small_vit()
    groups = Groups(model)
    before = groups.norms()
    factors = Factors(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.rand(2, 18))
    groups.shrink(factors)
    after = groups.norms()
    torch.testing.assert_close(
        after["neuron"], before["neuron"] * factors.neuron**2, check_dtype=False, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        after["v"], before["v"] * factors.v.view(6, 4) ** 2, check_dtype=False, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        after["qk"], before["qk"] * factors.qk.view(6, 4) ** 2, check_dtype=False, rtol=1e-5, atol=0
    )


def test_groups_of_blocks_of_several_sizes_are_those_of_each_block_alone():
    model = small_vit()
    narrow = small_vit(num_heads=2, mlp_ratio=0.5).blocks[1]
    model.blocks[1] = narrow
    groups = Groups(model)
    assert groups.geometry.sizes == ((3, 4, 18), (2, 6, 6))
    norms, alone = groups.norms(), small_vit(num_heads=2, mlp_ratio=0.5)
    alone.blocks[0] = narrow
    for name, one in Groups(alone).norms().items():
        there = groups.geometry.there(name)
        found = norms[name][len(there) // 2 :][there[len(there) // 2 :]]
        assert torch.equal(found, one[: len(one) // 2].flatten())
        assert not norms[name][~there].any()
    before = narrow.mlp.fc1.weight.clone()
    factors = [torch.ones(2, 3, 6), torch.ones(2, 3, 6), torch.ones(2, 18)]
    factors[2][1, 5] = 0.5
    groups.shrink(Factors(*factors))
    assert torch.equal(narrow.mlp.fc1.weight[5], before[5] * 0.5)
    assert torch.equal(narrow.mlp.fc1.weight[:5], before[:5])

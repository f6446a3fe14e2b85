"""The search beside a training loop on a small ViT: skips that really skip, gates, the budget, resuming."""

import copy
import dataclasses
from functools import partial

import loops
import pytest
import torch
from loops import batch, small_vit

import uvc
from uvc.config import Config, SolverConfig
from uvc.constraints import limits
from uvc.costs import cost
from uvc.solver import Search
from uvc.training.compress import compress

train = partial(loops.train, batch)


CONFIG = SolverConfig(every=1, anneal=(0.05, 0.3), prox_rate=0.3, snap=1e-2)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.7, 0.35])
def test_a_search_ends_at_most_at_the_budget_and_within_one_unit(budget, metric):
    model = small_vit()
    dense = getattr(cost(model), metric)
    search = Search(model, limits(model, budget, metric), steps=120, config=CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, search, optimizer, 120)
    hard = search.metrics()["hard_cost"]
    assert hard < 1.0 and hard >= budget - 1e-9
    search.harden()
    final = getattr(cost(model), metric)
    unit = max(map(max, search.limits[0].costs[3:]))
    assert budget * dense - unit < final <= budget * dense


@pytest.mark.parametrize("budget", [{"macs": 0.7, "params": 0.5}, {"macs": 0.4, "params": 0.8}])
def test_two_budgets_are_both_met_and_the_tighter_one_within_one_unit(budget):
    model = small_vit()
    dense = cost(model)
    search = Search(model, limits(model, budget), steps=120, config=CONFIG)
    train(model, search, torch.optim.AdamW(model.parameters(), lr=1e-3), 120)
    search.harden()
    final = cost(model)
    room = [budget[name] * getattr(dense, name) - getattr(final, name) for name in ("macs", "params")]
    assert min(room) >= 0
    assert any(left < max(map(max, limit.costs[3:])) for left, limit in zip(room, search.limits, strict=True))


def test_of_two_budgets_the_slack_one_ends_without_a_price():
    model = small_vit()
    search = Search(model, limits(model, {"macs": 0.95, "params": 0.4}), steps=120, config=CONFIG)
    train(model, search, torch.optim.AdamW(model.parameters(), lr=1e-3), 120)
    slack, tight = search.state.z.tolist()
    assert slack < 0.05 < tight


def test_dead_groups_are_skipped_and_stay_at_exact_zero_during_the_search():
    model = small_vit()
    search = Search(model, limits(model, 0.4), steps=100, config=CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, search, optimizer, 80)
    dead = search.state.families["neuron"].dead
    assert dead.any()
    for block, gone in zip(model.blocks, dead, strict=True):
        assert (block.mlp.fc1.weight[gone] == 0).all() and (block.mlp.fc2.weight[:, gone] == 0).all()
        if not block.skip_mlp:
            assert torch.equal(block.mlp.kept_neurons.cpu(), ~gone)


def test_sampled_skips_do_not_run_their_branch_and_gate_steps_run_all():
    model = small_vit()
    search = Search(model, limits(model, 0.9), steps=1000, config=SolverConfig(gate_init=0.0, gate_every=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runs = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: runs.append(1))
    counts = []
    for i in range(40):
        runs.clear()
        train(model, search, optimizer, 1, first=i)
        counts.append(len(runs))
    assert all(n == 3 for n in counts[::5])
    rest = [n for i, n in enumerate(counts) if i % 5]
    assert 0.3 < sum(rest) / (3 * len(rest)) < 0.7


def test_between_steps_nothing_sampled_is_left_on_the_model():
    model = small_vit()
    search = Search(model, limits(model, 0.9), steps=1000, config=SolverConfig(gate_init=-2.0, gate_every=3))
    plain = copy.deepcopy(model).eval()
    for i in range(6):
        train(model, search, torch.optim.SGD(model.parameters(), lr=0.0), 1, first=i)
        assert torch.equal(model.eval()(batch(99)[0]), plain(batch(99)[0]))
        model.train()


def test_a_half_with_nothing_left_is_skipped_once_gates_are_hard_and_never_below_the_budget():
    model = small_vit()
    search = Search(model, limits(model, 0.5), steps=1000, config=SolverConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    search.state.families["neuron"].dead[1] = True
    search.remove_dead(optimizer)
    assert not model.blocks[1].skip_mlp
    search.freeze_gates(optimizer)
    assert [block.skip_mlp for block in model.blocks] == [False, True, False]
    kept = Search(small_vit(), search.limits, steps=1000, config=SolverConfig(skip="none"))
    kept.state.families["neuron"].dead[1] = True
    kept.remove_dead(optimizer)
    assert not any(block.skip_mlp for block in kept.model.blocks)


def test_a_useless_half_is_skipped_and_the_useful_ones_are_kept():
    model = small_vit()
    config = SolverConfig(
        gate_init=1.0, gate_every=1, gate_weight=0.6, anneal=(0.0, 0.1), gate_rate=0.2, prox_rate=0.0
    )
    search = Search(model, limits(model, 0.6), steps=100, config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for family in search.state.families.values():
        family.open.fill_(True)
    for i in range(59):
        search.before()
        model(batch(i)[0])
        # what backward would leave: the loss falls with every gate but one
        grads = torch.full((3, 2), -1.0)
        grads[1, 0] = 0.0
        for gate, column in zip(search._gates, grads.unbind(1), strict=True):
            gate.grad = column.clone()
        search.observe()
        search.step(optimizer)
    search.freeze_gates(optimizer)
    assert [(b.skip_attn, b.skip_mlp) for b in model.blocks] == [
        (False, False),
        (True, False),
        (False, False),
    ]


def test_gates_never_skip_below_the_budget():
    model = small_vit()
    search = Search(model, limits(model, 0.9), steps=10, config=SolverConfig())
    search.state.theta.fill_(-3.0)
    search.freeze_gates(torch.optim.SGD(model.parameters(), lr=0.0))
    assert search.metrics()["hard_cost"] >= 0.9


def test_skip_blocks_governs_both_halves_with_one_gate():
    model = small_vit()
    search = Search(
        model,
        limits(model, 0.9),
        steps=1000,
        config=SolverConfig(gate_init=0.0, skip="blocks", gate_every=1000),
    )
    search.count = 1
    for _ in range(20):
        search.before()
        assert all(block.skip_attn == block.skip_mlp for block in model.blocks)


def test_skip_none_never_skips():
    model = small_vit()
    search = Search(model, limits(model, 0.5), steps=100, config=SolverConfig(skip="none"))
    for _ in range(20):
        search.before()
        assert not any(block.skip_attn or block.skip_mlp for block in model.blocks)


def test_a_search_resumed_from_its_tensors_goes_on_to_the_bit():
    torch.manual_seed(0)
    model = small_vit()
    search = Search(model, limits(model, 0.5), steps=60, config=CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, search, optimizer, 40)
    weights = copy.deepcopy(model.state_dict())
    tensors = {name: tensor.clone() for name, tensor in search.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    train(model, search, optimizer, 20, first=40)

    again = small_vit()
    resumed = Search(again, limits(again, 0.5), steps=60, config=CONFIG)
    again.load_state_dict(weights)
    resumed.load_state_dict(tensors)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
    optimizer.load_state_dict(moments)
    train(again, resumed, optimizer, 20, first=40)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert uvc.structure_of(model) == uvc.structure_of(again)


def frozen_model(*frozen):
    model = uvc.convert(small_vit())
    for layer in frozen:
        model.blocks[layer].requires_grad_(False)
    return model


def test_frozen_blocks_are_left_alone():
    model = frozen_model(0)
    before = copy.deepcopy(model.blocks[0].state_dict())
    bounds = limits(model, 0.6)
    Search.check(model, bounds, CONFIG), Search.prepare(model, CONFIG)
    search = Search(model, bounds, steps=120, config=CONFIG)
    train(model, search, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), 120)
    search.harden()
    assert uvc.structure_of(model).blocks[0] == uvc.Structure.dense(model).blocks[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.blocks[0].state_dict().items())
    unit = max(map(max, bounds[0].costs[3:]))
    assert bounds[0].most - unit < cost(model).macs <= bounds[0].most


def test_a_run_with_frozen_blocks_keeps_checkpoints_and_leaves_them_alone(tmp_path):
    model = frozen_model(1)
    before = copy.deepcopy(model.blocks[1].state_dict())
    config = Config(warmup_epochs=0, search_epochs=10, post_epochs=1, solver=CONFIG)
    result = compress(
        model, [batch(i) for i in range(4)], [batch(9)], budget=0.6, config=config, out=tmp_path
    )
    assert result.structure.blocks[1] == uvc.Structure.dense(model).blocks[1]
    assert result.cost.macs <= 0.6 * result.dense_cost.macs
    after = model.blocks[1].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_budget_that_frozen_blocks_leave_no_room_for_is_refused_before_training():
    model = frozen_model(0, 2)
    least = 1.0 - cost(model).blocks[1].macs / cost(model).macs
    with pytest.raises(ValueError, match=rf"below {least:.4f}, .* leaves frozen blocks alone \(0, 2 have"):
        Search.check(model, limits(model, least - 1e-3), CONFIG)
    Search.check(model, limits(model, least + 1e-3), CONFIG)
    with pytest.raises(ValueError, match=r"budget: .* smallest macs budget that leaves frozen blocks alone"):
        compress(model, [batch(0)], [batch(1)], least - 1e-3)


def test_the_first_matrix_of_a_frozen_half_alone_holds_all_its_groups():
    model = frozen_model()
    model.blocks[1].mlp.fc1.requires_grad_(False)
    search = Search(model, limits(model, 0.3), steps=60, config=CONFIG)
    train(model, search, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), 60)
    search.harden()
    assert len(uvc.structure_of(model).blocks[1].neurons) == 24


def test_a_block_that_no_gradient_reaches_is_left_alone():
    model = frozen_model()
    model.blocks[1].register_forward_hook(lambda block, args, out: args[0])  # the loss does not see it
    search = Search(model, limits(model, 0.6), steps=120, config=CONFIG)
    train(model, search, torch.optim.AdamW(model.parameters(), lr=1e-3), 120)
    search.harden()
    assert uvc.structure_of(model).blocks[1] == uvc.Structure.dense(model).blocks[1]
    assert cost(model).macs <= search.limits[0].most


def test_gradients_that_are_not_finite_stop_the_search_at_the_block():
    model = frozen_model()
    search = Search(model, limits(model, 0.6), steps=10, config=CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, search, optimizer, 2)
    search.before()
    model(batch(2)[0]).sum().backward()
    model.blocks[2].mlp.fc2.weight.grad[0, 3] = torch.nan
    search.observe()
    with pytest.raises(RuntimeError, match="block 2: the importance of its neurons is not finite"):
        search.step(optimizer)


def test_heads_are_removed_whole_where_dims_are_kept_in_multiples_of_the_head_dim():
    model = frozen_model()
    config = dataclasses.replace(CONFIG, families=("v", "neuron"), round_to=(4, 1))
    search = Search(model, limits(model, 0.4), steps=120, config=config)
    train(model, search, torch.optim.AdamW(model.parameters(), lr=1e-3), 120)
    search.harden()
    blocks = uvc.structure_of(model).blocks
    assert {len(dims) for block in blocks for dims in (*block.v_dims, *block.qk_dims)} == {4}
    assert any(len(block.heads) < 3 for block in blocks if block.attn)

"""The published semantics, beside loops over plain numbers, with the faults that make it an ablation."""

import loops
import pytest
import torch
from loops import batch, small_vit

from uvc.config import Config, SolverConfig
from uvc.constraints import limits
from uvc.costs import cost
from uvc.solver import PublishedSearch
from uvc.training.compress import compress


def search_of(budget=0.5):
    model = small_vit()
    return model, PublishedSearch(model, limits(model, budget), 100)


def train(model, search, steps, rate=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loops.train(batch, model, search, optimizer, steps)
    return optimizer


def test_a_step_moves_counts_and_duals_as_loops_over_plain_numbers_do():
    model, search = search_of(budget=0.7)
    neurons = search.families["neuron"]
    neurons.s.copy_(torch.tensor([0.0, 1.5, 3.0]))
    neurons.y.copy_(torch.tensor([0.0, 2.0, 5.0]))
    search.z.fill_(0.4)
    before = [block.mlp.fc2.weight.detach().square().sum(0).sort().values.tolist() for block in model.blocks]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    search._sample, s, y = None, neurons.s.tolist(), neurons.y.tolist()
    search.step(optimizer)
    run = float(torch.tensor([0.0, 3.0]).softmax(0)[1])
    slope = -run * search.prices.neuron[0] / search.dense_cost
    gradients = [y[i] * before[i][[0, 2, 3][i]] + 0.4 * slope for i in range(3)]
    bound = max(1.0, *map(abs, gradients))
    wanted = [max(s[i] - 0.02 * gradients[i] / bound, 0.0) for i in range(3)]
    assert neurons.s.tolist() == pytest.approx(wanted, rel=1e-5)
    left = [sum(before[i][: -int(-wanted[i] // 1)]) for i in range(3)]
    assert neurons.y.tolist() == pytest.approx([y[i] + 1e-4 * left[i] for i in range(3)], rel=1e-5)


def test_the_prox_divides_the_chosen_by_one_plus_twice_rate_times_multiplier():
    model, search = search_of()
    neurons = search.families["neuron"]
    neurons.s.fill_(1e-9)  # the ceil of a trifle is one whole group
    neurons.y.fill_(2.0)
    weights = [block.mlp.fc2.weight.detach().clone() for block in model.blocks]
    search.step(torch.optim.SGD(model.parameters(), lr=0.1))
    for block, old in zip(model.blocks, weights, strict=True):
        least = int(old.square().sum(0).argmin())
        wanted = old.clone()
        wanted[:, least] /= 1.4
        assert torch.allclose(block.mlp.fc2.weight, wanted, rtol=1e-6)


def test_far_from_the_budget_the_cost_has_no_gradient():
    _, far = search_of(budget=0.2)
    _, near = search_of(budget=0.8)
    assert all((g == 0).all() for g in far._count_gradients().values())
    assert all((g < 0).all() for g in near._count_gradients().values())


def test_multipliers_never_unwind_and_the_budgets_winds_up():
    model, search = search_of(budget=0.3)
    seen = []
    for i in range(4):
        train(model, search, 5)
        seen.append((float(search.z), float(search.families["v"].y.sum())))
        assert seen[i] >= seen[max(i - 1, 0)]
    assert seen[-1][0] > 5


def test_gates_move_once_in_fifty_steps_by_their_mean_gradient():
    model, search = search_of()
    start = search.gate.clone()
    train(model, search, 49)
    assert torch.equal(search.gate, start)
    mean = search.gate_mean.clone()
    train(model, search, 1)
    assert not torch.equal(search.gate, start)
    assert torch.allclose(search.gate, start - 0.1 * search.velocity)
    assert (mean != 0).any() and (search.gate_mean == 0).all()


def test_it_ends_within_the_budget_although_it_hardly_compresses():
    model, search = search_of(budget=0.4)
    dense = cost(model).macs
    train(model, search, 60)
    assert search.metrics()["soft_cost"] > 0.8
    search.harden()
    unit = max(map(max, search.limits[0].costs[3:]))
    assert 0.4 * dense - unit < cost(model).macs <= 0.4 * dense


def test_a_resumed_search_goes_on_with_the_same_gates():
    model, search = search_of()
    train(model, search, 7)
    tensors = {name: tensor.clone() for name, tensor in search.state_dict().items()}
    _, again = search_of()
    again.load_state_dict(tensors)
    search.before(), again.before()
    assert torch.equal(search._sample, again._sample) and again.count == 7


def test_an_unknown_method_is_refused_by_name():
    config = Config(solver=SolverConfig(method="umec"))
    with pytest.raises(ValueError, match=r"solver method: 'umec'; known are .*"):
        compress(small_vit(), [batch(0)], [batch(1)], config=config)


def test_a_frozen_block_is_refused_by_name():
    model = small_vit()
    model.blocks[1].mlp.requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight: it is frozen"):
        PublishedSearch.check(model, limits(model, 0.5), SolverConfig())

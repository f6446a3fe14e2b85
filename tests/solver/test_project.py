"""The final projection: at most the budget, and no remaining unit fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uvc.budget import Prices
from uvc.solver.objective import hard_cost, masks_cost
from uvc.solver.project import project_to_budget
from uvc.solver.state import Geometry, State

PRICES = Prices(fixed=400, attn=3, mlp=2, qk=11, v=13, neuron=7)


def state_of(geometry, seed):
    torch.manual_seed(seed)
    state = State.new(geometry, gate_init=6.0)
    state.hard = True
    for family in state.families.values():
        family.importance.exponential_()
    return state


@settings(max_examples=40, deadline=None)
@given(
    budget=st.floats(0.35, 1.0), seed=st.integers(0, 1000), layers=st.integers(1, 4), heads=st.integers(1, 4)
)
def test_cost_is_at_most_the_budget_and_no_unit_fits_any_more(budget, seed, layers, heads):
    geometry = Geometry(layers, heads, 5, 11)
    state = state_of(geometry, seed)
    dense = hard_cost(state, PRICES)
    budget_cost = int(budget * dense)
    if budget_cost < PRICES.fixed:
        return
    qk, v, neuron, running = project_to_budget(state, PRICES, budget_cost)
    cost = masks_cost(qk, v, neuron, running, PRICES)
    assert cost <= budget_cost
    living = v.any(-1, keepdim=True) & running[:, :1, None]
    room = budget_cost - cost
    assert room < PRICES.qk or not (living & ~qk).any()
    assert room < PRICES.v or not (living & ~v).any()
    assert room < PRICES.neuron or not (~neuron & running[:, 1:]).any()


def test_the_least_important_units_per_cost_go_first():
    state = state_of(Geometry(2, 2, 6, 20), seed=1)
    state.families["head"].importance.fill_(1e9)
    for name in ("qk", "v"):
        state.families[name].importance.fill_(1e9)
    _, _, neuron, _ = project_to_budget(state, PRICES, hard_cost(state, PRICES) - 10 * PRICES.neuron)
    importance = state.families["neuron"].importance
    assert int((~neuron).sum()) == 10
    assert importance[~neuron].max() < importance[neuron].min()


def test_everything_goes_when_only_the_fixed_part_fits():
    state = state_of(Geometry(2, 2, 3, 4), seed=2)
    qk, v, neuron, running = project_to_budget(state, PRICES, PRICES.fixed)
    assert masks_cost(qk, v, neuron, running, PRICES) == PRICES.fixed
    assert not running.any()


def test_less_than_the_fixed_part_is_refused():
    state = state_of(Geometry(2, 2, 3, 4), seed=2)
    with pytest.raises(ValueError, match="budget: 399 cannot be met"):
        project_to_budget(state, PRICES, PRICES.fixed - 1)

"""The final rounding: at most the budget, and no remaining unit fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import small_vit

from uvc.constraints import Limit, check_multiples
from uvc.costs import Prices
from uvc.solver.objective import hard_cost, masks_cost
from uvc.solver.rounding import round_to_budget
from uvc.solver.state import Geometry, State


def prices_of(layers):
    """Prices that differ from block to block."""
    parts = {"attn": (3, 5), "mlp": (2, 4), "qk": (11, 10), "v": (13, 12), "neuron": (7, 9)}
    return Prices(fixed=400, **{name: (pair * layers)[:layers] for name, pair in parts.items()})


PRICES = prices_of(2)


def up_to(most):
    """A limit of `most`, whatever the dense cost."""
    return Limit("macs", PRICES, most, 1.0)


def state_of(geometry, seed, **options):
    torch.manual_seed(seed)
    state = State.new(geometry, **options)
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
    state, prices = state_of(geometry, seed), prices_of(layers)
    limit = Limit("macs", prices, hard_cost(state, prices), budget)
    if limit.most < prices.fixed:
        return
    masks = qk, v, neuron, running = round_to_budget(state, [limit])
    cost = masks_cost(masks, prices)
    assert cost <= limit.most
    living = v.any(-1, keepdim=True) & running[:, :1, None]
    room = limit.most - cost
    for layer in range(layers):
        assert room < prices.qk[layer] or not (living & ~qk)[layer].any()
        assert room < prices.v[layer] or not (living & ~v)[layer].any()
        assert room < prices.neuron[layer] or not (~neuron & running[:, 1:])[layer].any()


@settings(max_examples=30, deadline=None)
@given(budget=st.floats(0.35, 1.0), seed=st.integers(0, 1000), dead=st.floats(0, 0.6))
def test_only_multiples_are_kept_and_no_further_multiple_fits(budget, seed, dead):
    geometry, prices = Geometry(3, 2, 8, 24), prices_of(3)
    state = state_of(geometry, seed, multiples=(4, 8))
    limit = Limit("macs", prices, hard_cost(state, prices), budget)
    for name in ("qk", "v", "neuron"):
        family = state.families[name]
        family.dead.copy_(torch.rand_like(family.importance) < dead)
    masks = qk, v, neuron, running = round_to_budget(state, [limit])
    assert not (qk.sum(-1) % 4).any() and not (v.sum(-1) % 4).any() and not (neuron.sum(-1) % 8).any()
    room = limit.most - masks_cost(masks, prices)
    assert room >= 0
    living = v.any(-1, keepdim=True) & running[:, :1, None]
    for layer in range(3):
        assert room < 4 * prices.qk[layer] or not (living & ~qk)[layer].any()
        assert room < 4 * prices.v[layer] or not (living & ~v)[layer].any()
        assert room < 8 * prices.neuron[layer] or not (~neuron & running[:, 1:])[layer].any()


@pytest.mark.parametrize(
    ("round_to", "says"),
    [
        ((5, 1), "5 does not divide the head dim of this model, 6"),
        ((1, 16), "16 does not divide the neurons of this model, 40"),
        ((0, 1), "0 does not"),
        ((1, -2), "-2 does not"),
    ],
)
def test_multiples_must_divide_the_model(round_to, says):
    with pytest.raises(ValueError, match=f"round_to: {says}"):
        check_multiples(small_vit(), round_to)


@settings(max_examples=30, deadline=None)
@given(first=st.floats(0.4, 1.0), second=st.floats(0.3, 1.0), seed=st.integers(0, 1000))
def test_two_limits_are_both_met_and_no_unit_fits_both(first, second, seed):
    geometry, prices = Geometry(3, 2, 5, 11), prices_of(3)
    other = Prices(10.0, attn=(1, 0, 2), mlp=(0, 1, 0), qk=(1.5, 2, 1), v=(0.5, 1, 1), neuron=(3, 2, 4.5))
    state = state_of(geometry, seed, limits=2)
    limits = [Limit("macs", p, hard_cost(state, p), b) for p, b in ((prices, first), (other, second))]
    masks = qk, v, neuron, running = round_to_budget(state, limits)
    room = [limit.most - masks_cost(masks, limit.costs) for limit in limits]
    assert min(room) >= 0

    def fits(name, layer):
        return all(
            left >= getattr(limit.costs, name)[layer] for left, limit in zip(room, limits, strict=True)
        )

    living = v.any(-1, keepdim=True) & running[:, :1, None]
    for layer in range(3):
        assert not (fits("qk", layer) and (living & ~qk)[layer].any())
        assert not (fits("v", layer) and (living & ~v)[layer].any())
        assert not (fits("neuron", layer) and (~neuron & running[:, 1:])[layer].any())


def test_the_least_important_units_per_cost_go_first():
    state = state_of(Geometry(2, 2, 6, 20), seed=1)
    for name in ("qk", "v"):
        state.families[name].importance.fill_(1e9)
    same = PRICES._replace(neuron=(7, 7))
    dense = hard_cost(state, same)
    _, _, neuron, _ = round_to_budget(state, [Limit("macs", same, dense, (dense - 70) / dense)])
    importance = state.families["neuron"].importance
    assert int((~neuron).sum()) == 10
    assert importance[~neuron].max() < importance[neuron].min()


def test_everything_goes_when_only_the_fixed_part_fits():
    state = state_of(Geometry(2, 2, 3, 4), seed=2)
    masks = round_to_budget(state, [up_to(PRICES.fixed)])
    assert masks_cost(masks, PRICES) == PRICES.fixed
    assert not masks.running.any()


def test_less_than_the_fixed_part_is_refused():
    state = state_of(Geometry(2, 2, 3, 4), seed=2)
    with pytest.raises(ValueError, match="budget: 399 macs cannot be met"):
        round_to_budget(state, [up_to(PRICES.fixed - 1)])


def test_what_is_held_stays_and_what_cannot_be_met_then_is_said():
    state = state_of(Geometry(2, 2, 3, 4), seed=2)
    state.families["neuron"].open[1] = False
    state.families["neuron"].importance[1] = 0.0
    held = PRICES.fixed + 4 * PRICES.neuron[1] + PRICES.mlp[1]
    masks = round_to_budget(state, [up_to(held)])
    assert masks.running.tolist() == [[False, False], [False, True]] and masks.neuron[1].all()
    assert masks_cost(masks, PRICES) == held
    with pytest.raises(ValueError, match="but for what no gradient reached, costs"):
        round_to_budget(state, [up_to(held - 1)])

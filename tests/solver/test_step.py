"""The vectorised solver step and its slow twin, side by side."""

import math

import pytest
import torch

from uvc.config import SolverConfig
from uvc.constraints import Limit
from uvc.costs import Prices
from uvc.solver import reference, step
from uvc.solver.importance import quantiles
from uvc.solver.objective import hard_cost, marginal, soft_cost
from uvc.solver.reference import SlowState
from uvc.solver.state import FAMILIES, Geometry, State, smallest


def prices_of(layers):
    """Prices that differ from block to block."""
    parts = {"attn": (3, 5), "mlp": (2, 4), "qk": (11, 10), "v": (13, 12), "neuron": (7, 9)}
    return Prices(fixed=500, **{name: (pair * layers)[:layers] for name, pair in parts.items()})


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_state(geometry, seed=0, limits=1, multiples=(1, 1)):
    torch.manual_seed(seed)
    state = State.new(geometry, gate_init=3.0, limits=limits, multiples=multiples)
    state.theta.normal_(2.0, 1.0)
    for family in state.families.values():
        # some ties on purpose
        family.importance.copy_((torch.rand_like(family.importance) * 50).round() / 10)
        family.scale = 1.5
    return state


def close(rows, tensor):
    """Lists, or lists of lists that may differ in length, against all their numbers one after the other."""
    flat = [n for row in rows for n in (row if isinstance(row, list) else [row])]
    torch.testing.assert_close(torch.tensor(flat), tensor.detach().flatten(), rtol=1e-9, atol=1e-12)


def second_prices(layers):
    """Another metric, in another unit: neurons are expensive."""
    parts = {"attn": (0, 1), "mlp": (1, 0), "qk": (0.5, 0.4), "v": (0.3, 0.3), "neuron": (2.5, 3.5)}
    return Prices(fixed=20.0, **{name: (pair * layers)[:layers] for name, pair in parts.items()})


def limits_of(state, budgets):
    """Limits in as many metrics as there are budgets."""
    costs = (prices_of(state.geometry.layers), second_prices(state.geometry.layers))
    return [
        Limit("macs", price, hard_cost(state, price), budget)
        for price, budget in zip(costs, budgets, strict=False)
    ]


@pytest.mark.parametrize("budgets", [(0.3,), (0.4, 0.3)], ids=["one budget", "two budgets"])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(3, 4, 5, 17),
        Geometry(1, 1, 1, 1),
        Geometry(2, 3, 8, 0 + 7),
        Geometry.of([(2, 6, 12), (4, 3, 8), (1, 6, 4)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("multiples", [False, True], ids=["any size", "multiples"])
@pytest.mark.parametrize("held", [False, True], ids=["all open", "some held"])
def test_a_hundred_steps_equal_the_slow_twin(geometry, budgets, multiples, held):
    config = SolverConfig()
    sizes = geometry.sizes or [(geometry.heads, geometry.head_dim, geometry.hidden)]
    multiples = [math.gcd(*each) for each in zip(*sizes, strict=True)][1:] if multiples else (1, 1)
    state = random_state(geometry, limits=len(budgets), multiples=multiples)
    if held:
        state.families["v"].open[: geometry.heads] = False
        state.families["neuron"].open[-1] = False
    limits = limits_of(state, budgets)
    slow = SlowState.of(state)
    there = {name: ~family.absent for name, family in state.families.items()}
    whole = {name: mask.any(1) for name, mask in there.items()}
    norms = {
        name: torch.rand_like(family.importance) * there[name] for name, family in state.families.items()
    }
    moved, snapped = 0.0, 0
    for i in range(100):
        factors, slow_factors = step.prox(state, config), reference.prox(slow, config)
        for name, rows in slow_factors.items():
            close(rows, getattr(factors, name).view(there[name].shape)[there[name]])
        prices, slow_prices = marginal(state, limits), reference.marginal(slow, limits)
        for part, slow_part in zip(prices[1:], slow_prices[1:], strict=True):
            assert part == pytest.approx(slow_part, rel=1e-9)
        scores, slow_scores = quantiles(state, prices), reference.quantiles(slow, prices)
        for name in FAMILIES:
            close(slow_scores[name], scores[name][there[name]])
        step.primal(state, prices, config), reference.primal(slow, prices, config)
        targets, tightened = [max(1.0 - i / 60, b) for b in budgets], [0.01] * len(budgets)
        step.dual(state, norms, limits, targets, tightened, config)
        slow_norms = {
            n: [row[mask].tolist() for row, mask in zip(t, there[n], strict=True) if mask.any()]
            for n, t in norms.items()
        }
        reference.dual(slow, slow_norms, limits, targets, tightened, config)
        for limit in limits:
            slow_cost = reference.soft_cost(slow, limit.costs)
            assert float(soft_cost(state, limit.costs)) == pytest.approx(slow_cost, rel=1e-9)
        assert state.z.tolist() == pytest.approx(slow.z, rel=1e-9, abs=1e-12)
        changed = step.snap(state, norms, limits, config)
        assert changed == reference.snap(slow, slow_norms, limits, config)
        assert state.settled == slow.settled
        snapped += changed
        for name, family in state.families.items():
            # Of a padded row what is not there counts as removed.
            close(slow.s[name], (1.0 - (1.0 - family.s) / family.own())[whole[name]])
            close(slow.y[name], family.y[whole[name]])
            assert family.dead[there[name]].tolist() == [dead for row in slow.dead[name] for dead in row]
            assert family.dead[~there[name]].all()
            assert not (family.dead & there[name] & ~family.open[:, None] & (name != "qk")).any()
            norms[name] = norms[name] * torch.where(family.removed(), 0.5, 1.0)
            moved += float(family.s.sum())
    assert (moved > 0 and snapped > 0) or geometry.hidden == 1


def test_the_cost_follows_the_budget_and_z_unwinds_after_an_overshoot():
    config = SolverConfig()
    state = random_state(Geometry(4, 3, 16, 64))
    prices = prices_of(state.geometry.layers)
    state.theta.fill_(8.0)
    norms = {name: torch.zeros_like(family.importance) for name, family in state.families.items()}
    dense = hard_cost(state, prices)
    limit = Limit("macs", prices, dense, 0.5)
    for target in (0.8, 0.5, 0.7):
        for _ in range(400):
            step.primal(state, prices, config)
            step.dual(state, norms, [limit], [target], [0.0], config)
        assert float(soft_cost(state, prices)) / dense == pytest.approx(target, abs=0.02)


def test_at_rest_every_kept_group_is_worth_more_per_cost_than_every_removed_one():
    config = SolverConfig(primal_rate=0.1, budget_rate=0.01)
    state = random_state(Geometry(4, 3, 16, 64))
    prices = prices_of(state.geometry.layers)
    for family in state.families.values():
        family.importance.uniform_(0.1, 5.0)
    norms = {name: torch.zeros_like(family.importance) for name, family in state.families.items()}
    limit = Limit("macs", prices, hard_cost(state, prices), 0.6)
    for _ in range(3000):
        step.primal(state, prices, config)
        step.dual(state, norms, [limit], [0.6], [0.0], config)
    scores = quantiles(state, prices)
    kept = torch.cat([scores[n][~state.families[n].removed()] for n in ("qk", "v", "neuron")])
    removed = torch.cat([scores[n][state.families[n].removed()] for n in ("qk", "v", "neuron")])
    assert len(removed) > 50 and removed.max() < kept.min() + 0.05


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_snapping_never_passes_the_budget_and_settles_within_one_unit_of_it(budget):
    config = SolverConfig()
    state = random_state(Geometry(3, 4, 5, 17))
    prices = prices_of(state.geometry.layers)
    state.theta.fill_(6.0)
    state.hard = True
    norms = {name: torch.rand_like(family.importance) * 1e-6 for name, family in state.families.items()}
    limit = Limit("macs", prices, hard_cost(state, prices), budget)
    for family in state.families.values():
        family.s.fill_(1.0)
    assert step.snap(state, norms, [limit], config)
    for _ in range(40):
        for family in state.families.values():
            family.s.fill_(1.0)
        step.snap(state, norms, [limit], config)
    assert state.settled
    assert limit.most <= hard_cost(state, prices) < limit.most + max(map(max, prices[3:]))
    assert all(torch.equal(f.s, f.dead.double().mean(1)) for f in state.families.values())


def test_groups_with_norm_left_stay():
    state = random_state(Geometry(2, 2, 4, 8))
    prices = prices_of(state.geometry.layers)
    norms = {name: torch.ones_like(family.importance) for name, family in state.families.items()}
    for family in state.families.values():
        family.s.fill_(0.5)
    nothing = Limit("macs", prices, 1, 1.0)
    assert not step.snap(state, norms, [nothing], SolverConfig())
    assert not any(family.dead.any() for family in state.families.values())


def test_the_smallest_break_ties_by_index():
    values = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert smallest(values, torch.tensor([2.0])).tolist() == [[False, True, False, True]]
    assert smallest(values, torch.tensor([3.0])).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_importance_that_is_not_finite_is_refused_by_its_block(value):
    state = random_state(Geometry(3, 2, 4, 8))
    state.check_finite()
    state.families["v"].importance[3, 1] = value
    with pytest.raises(RuntimeError, match="block 1: the importance of its v dims is not finite"):
        state.check_finite()


def test_state_survives_a_round_trip_through_flat_tensors():
    state, other = random_state(Geometry(2, 2, 4, 8)), State.new(Geometry(2, 2, 4, 8), 3.0)
    state.families["v"].dead[0, 1] = True
    state.hard, state.settled = True, True
    other.load_tensors(state.tensors())
    assert all(
        torch.equal(a, b) for a, b in zip(state.tensors().values(), other.tensors().values(), strict=True)
    )

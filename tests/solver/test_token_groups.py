"""Patch tokens in the search: what a bucket is worth and costs, the step and its twin, the budget."""

from functools import partial

import loops
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import uvc
from uvc.config import SolverConfig
from uvc.constraints import Limit, limits
from uvc.costs import Prices, count_macs
from uvc.solver import Search, check_tokens, reference, step
from uvc.solver.importance import quantiles
from uvc.solver.objective import hard_cost, marginal
from uvc.solver.reference import SlowState
from uvc.solver.state import Geometry, State, TokenState
from uvc.solver.token_groups import Tokens

CONFIG = SolverConfig(every=1, anneal=(0.05, 0.3), prox_rate=0.3, snap=1e-2, tokens=3)


def small_vit(**changes):
    torch.manual_seed(0)
    settings = dict(img_size=32, patch_size=8, in_chans=1, num_classes=5, embed_dim=12, depth=4, num_heads=3)
    return uvc.convert(VisionTransformer(mlp_ratio=2.0, **{**settings, **changes}))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 32, 32, generator=generator), torch.randint(0, 5, (8,), generator=generator)


train = partial(loops.train, batch)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("geometry", [Geometry(3, 4, 5, 17), Geometry(1, 1, 1, 1)], ids=str)
def test_a_hundred_steps_with_tokens_equal_the_slow_twin(geometry, double):
    torch.manual_seed(0)
    config = SolverConfig()
    state = State.new(geometry, gate_init=3.0)
    for family in state.families.values():
        family.importance.copy_((torch.rand_like(family.importance) * 50).round() / 10)
    # Some ties on purpose, and a site whose worst bucket is worth more than the best of an earlier one.
    state.tokens = TokenState.new(3, 7)
    state.tokens.importance.copy_((torch.rand(3, 7) * 20).round() / 4)
    state.tokens.price.copy_(torch.tensor([90.0, 40.0, 20.0]))
    state.tokens.shares = [0.8]
    row = (11,) * geometry.layers
    prices = Prices(500, row, row, row, row, row)
    limit = Limit("macs", prices, hard_cost(state, prices), 0.4)
    slow, moved = SlowState.of(state), 0.0
    for i in range(100):
        scores, slow_scores = quantiles(state, marginal(state, [limit])), reference.quantiles(slow, prices)
        for name in ("token", "qk", "neuron"):
            torch.testing.assert_close(torch.tensor(slow_scores[name]), scores[name], rtol=1e-5, atol=1e-6)
        step.primal(state, prices, config), reference.primal(slow, prices, config)
        assert state.tokens.s.tolist() == pytest.approx(slow.token_s, abs=1e-5)
        norms = {name: torch.rand_like(family.importance) for name, family in state.families.items()}
        target = [max(1.0 - i / 60, 0.4)]
        step.dual(state, norms, [limit], target, [0.01], config)
        reference.dual(slow, {n: t.tolist() for n, t in norms.items()}, [limit], target, [0.01], config)
        assert state.z.tolist() == pytest.approx(slow.z, abs=1e-5)
        assert state.tokens.s.tolist() == sorted(state.tokens.s.tolist()) and state.tokens.s.max() < 0.86
        moved += float(state.tokens.s.sum())
    assert moved > 1


def test_a_buckets_importance_is_the_squared_gradient_of_a_gate_on_what_the_halves_read():
    model = small_vit().double()
    tokens = Tokens(model, 3)
    assert tokens.sites == [1, 2, 3] and tokens.left[:3] == [16, 15, 14]
    images, labels = batch(0)
    tokens.watch()
    torch.nn.functional.cross_entropy(model(images.double()), labels).backward()
    tokens.observe(scale=1.0, decay=0.0)
    # One gate per interval and place, multiplied by hand into the input of every half of the interval.
    gates = torch.ones(3, 17, dtype=torch.float64, requires_grad=True)
    for interval, halves in enumerate(
        [
            [model.blocks[1].mlp, model.blocks[2].attn],
            [model.blocks[2].mlp, model.blocks[3].attn],
            [model.blocks[3].mlp],
        ]
    ):
        for half in halves:
            half.register_forward_pre_hook(lambda _, args, i=interval: (args[0] * gates[i, :, None],))
    torch.nn.functional.cross_entropy(model(images.double()), labels).backward()
    expected = gates.grad[:, 1:].flip(1).square()  # places from the best, buckets from the worst
    assert tokens.state.importance.shape == (3, 16) and expected[:2].all()
    torch.testing.assert_close(tokens.state.importance.double(), expected, rtol=1e-4, atol=1e-12)


def test_buckets_that_are_dropped_keep_their_importance_and_hooks_do_not_stay():
    model = small_vit()
    tokens = Tokens(model, 3)
    tokens.state.dropped = [2, 5, 5]
    tokens.state.importance.fill_(7.0)
    tokens.apply()
    images, labels = batch(0)
    tokens.watch()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    tokens.observe(scale=1.0, decay=0.0)
    assert [(row == 7.0).sum().item() for row in tokens.state.importance] == [2, 5, 5]
    assert not any(half._forward_pre_hooks for block in model.blocks for half in (block.attn, block.mlp))


def test_the_price_of_a_bucket_is_what_it_costs_in_its_interval():
    model = small_vit()
    limit = limits(model, 0.5)
    state = State.new(Geometry(4, 3, 4, 24), 9.0)
    state.hard = True
    tokens = Tokens(model, 3)
    tokens.reprice(state, limit)
    N, D, A, hidden = 17, 12, 12, 24
    attention = 2 * A * (2 * D + N * N - (N - 1) ** 2)
    # Less the row of scores that only a site where tokens go needs.
    mlp = 2 * D * hidden - A * N
    assert tokens.state.price.tolist() == [mlp + attention, mlp + attention, mlp]
    assert tokens.state.shares[0] == pytest.approx(16 * float(tokens.state.price.sum()) / limit[0].dense)


@pytest.mark.parametrize("budget", [0.7, 0.3])
def test_a_search_with_tokens_ends_at_the_budget_that_torch_counts(budget):
    model = small_vit()
    dense = uvc.cost(model).macs
    search = Search(model, limits(model, budget), steps=60, config=CONFIG)
    train(model, search, adam(model), 60)
    hard = search.metrics()["hard_cost"]
    assert budget - 1e-9 <= hard < 1.0
    search.harden()
    final = uvc.cost(model).macs
    unit = max(map(max, search.limits[0].costs[3:]))
    assert budget * dense - unit < final <= budget * dense
    small = uvc.compact(model).eval()
    assert count_macs(small, torch.randn(1, 1, 32, 32)) == final
    kept = [block.tokens for block in uvc.structure_of(model).blocks]
    assert kept[0] is None and kept[3] is not None and kept[3] < 16
    assert not any(block._slimming is not None and block._slimming.always for block in model.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.5, 0.2])
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "t2t_vit_14"])
def test_models_of_the_paper_end_at_the_budget_that_torch_counts(name, budget):
    torch.manual_seed(0)
    model = uvc.convert(timm.create_model(name))
    dense = uvc.cost(model).macs
    config = SolverConfig(every=1, tokens=3, anneal=(0.0, 0.5))
    search = Search(model, limits(model, budget), steps=6, config=config)
    optimizer = adam(model)
    for i in range(6):
        search.before()
        out = model.eval()(torch.randn(1, 3, 224, 224))
        torch.nn.functional.cross_entropy(out, torch.tensor([i])).backward()
        search.observe()
        search.step(optimizer)
        optimizer.zero_grad()
    search.harden()
    final = uvc.cost(model).macs
    assert 0.999 * budget * dense < final <= budget * dense
    small = uvc.compact(model)
    assert count_macs(small, torch.randn(1, 3, 224, 224)) == final
    assert any(block.tokens is not None for block in uvc.structure_of(model).blocks)


def test_tokens_that_matter_stay_and_useless_ones_go_before_all_else():
    for useless in (True, False):
        model = small_vit()
        search = Search(model, limits(model, 0.75), steps=30, config=CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        for i in range(30):
            images, labels = batch(i)
            search.before()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            search.observe()
            search.state.tokens.importance.fill_(0.0 if useless else 1e6)
            search.step(optimizer)
            optimizer.zero_grad()
        search.harden()
        structure = uvc.structure_of(model)
        if useless:
            assert all(block.tokens is not None for block in structure.blocks[1:])
        else:
            assert all(block.tokens is None for block in structure.blocks)


def test_a_resumed_search_goes_on_with_the_same_tokens():
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.01)  # keeps nothing, so that only the search resumes

    model = small_vit()
    search = Search(model, limits(model, 0.3), steps=60, config=CONFIG)
    train(model, search, sgd(model), 30)
    assert any(search.state.tokens.dropped) and not search.state.settled
    other = small_vit()
    other.load_state_dict(model.state_dict())
    resumed = Search(other, limits(other, 0.3), steps=60, config=CONFIG)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in search.state_dict().items()})
    assert uvc.structure_of(other) == uvc.structure_of(model)
    for one, its in ((model, search), (other, resumed)):
        train(one, its, sgd(one), 10, first=30)
        its.harden()
    assert uvc.structure_of(other) == uvc.structure_of(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "sites", "metrics", "says"),
    [
        ({}, 4, ["macs"], "solver tokens: 4 blocks are to drop tokens; use 0 to 3"),
        ({}, 2, ["params"], "solver tokens: params count no tokens; set a budget in macs"),
        ({}, 1, ["macs", "latency"], "solver tokens: a latency is measured with all tokens"),
        (dict(global_pool=""), 1, ["macs"], "global_pool '' and returns every token"),
    ],
    ids=["too many sites", "no budget that counts tokens", "latency", "every token is returned"],
)
def test_tokens_that_cannot_go_are_one_clear_line(changes, sites, metrics, says):
    with pytest.raises(ValueError, match=says):
        check_tokens(small_vit(**changes), sites, metrics)


def test_a_model_that_drops_tokens_already_searches_only_the_rest():
    model = small_vit()
    dense = uvc.cost(model).macs
    structure = uvc.Structure.dense(model).with_tokens(model, 0.5, at=(1,))
    uvc.apply_structure(model, structure)
    with pytest.raises(ValueError, match="drops tokens already"):
        Search.check(model, limits(model, 0.4), CONFIG)
    search = Search(model, limits(model, 0.4), steps=60, config=SolverConfig(every=1, anneal=(0.05, 0.3)))
    train(model, search, adam(model), 60)
    search.harden()
    assert uvc.structure_of(model).blocks[1].tokens == 8
    assert 0.38 * dense < uvc.cost(model).macs <= 0.4 * dense

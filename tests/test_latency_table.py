"""The latency table: interpolation, prices, JSON, what it refuses, and a search under a latency budget."""

import copy
import dataclasses
import json

import pytest
import timm
import torch
from oracle import small_vit
from test_budget_held import noise_steps

import uvc
from uvc import latency_table
from uvc.config import SolverConfig
from uvc.constraints import limits, reachable
from uvc.costs import BlockCounts, Counts, counts, total
from uvc.latency_table import LatencyTable, measure, verify
from uvc.solver import Search
from uvc.structure import Structure

# Of `small_vit`: 4 heads of 6 dims, 40 neurons. Halves cost more than in proportion when they are small.
TABLE = LatencyTable(
    model="small",
    device="paper",
    threads=1,
    versions="none",
    batch=2,
    image=(3, 16, 16),
    blocks=3,
    dim=24,
    fixed=1.0,
    heads=(0, 1, 2, 4),
    dims=(1, 3, 6),
    attn=((0.5, 0.5, 0.5), (0.8, 1.0, 1.2), (1.0, 1.3, 1.7), (1.4, 2.0, 3.0)),
    neurons=(0, 10, 20, 40),
    mlp=(0.2, 1.0, 1.5, 2.0),
)


def block(**kept):
    return BlockCounts(**{**dict(attn=0, mlp=0, qk=0, v=0, neuron=0, heads=0), **kept})


@pytest.mark.parametrize(
    ("kept", "time"),
    [
        (block(), 0.0),
        (block(attn=1), 0.5),
        (block(mlp=1), 0.2),
        (block(attn=1, heads=4, qk=24, v=24), 3.0),
        (block(attn=1, heads=2, qk=4, v=8), 1.3),
        (block(attn=1, heads=3, qk=9, v=9), 1.65),
        (block(attn=1, heads=1, qk=5, v=4), 1.1),
        (block(mlp=1, neuron=15), 1.25),
        (block(attn=0.5, heads=4, qk=24, v=24, mlp=0.25, neuron=40), 2.0),
    ],
    ids=str,
)
def test_times_are_those_measured_and_linear_in_between(kept, time):
    assert TABLE.block(0, kept) == pytest.approx(time)


def test_prices_are_the_slope_of_an_eighth_and_meet_the_cost_where_they_were_taken():
    kept = Counts(attn=(1, 1), mlp=(1, 1), qk=(24, 12), v=(24, 6), neuron=(40, 12), heads=(4, 3))
    prices = TABLE.at(kept)
    assert total(prices, kept) == pytest.approx(total(TABLE, kept))
    assert prices.qk[0] == pytest.approx((2.0 - TABLE._attn(4, 2.25)) / 0.75 / 8)
    assert prices.qk == prices.v
    assert prices.neuron[0] == pytest.approx(0.5 / 20)
    assert prices.neuron[1] == pytest.approx((1.1 - TABLE._mlp(7)) / 5)


@pytest.mark.parametrize("heads", [0, 0.5, 4])
def test_no_unit_is_free(heads):
    flat = dataclasses.replace(TABLE, mlp=(0.2, 1.0, 1.0, 1.0))
    kept = Counts(*((n,) for n in block(attn=1, mlp=1, qk=0, v=0, neuron=40, heads=heads)))
    assert min(flat.at(kept).qk + flat.at(kept).neuron) > 0


def test_full_heads_may_take_less_than_ragged_ones_and_have_a_price_all_the_same():
    dip = dataclasses.replace(TABLE, attn=(*TABLE.attn[:-1], (1.4, 2.0, 1.8)))
    full = Counts(attn=(1,), mlp=(1,), qk=(24,), v=(24,), neuron=(40,), heads=(4,))
    assert dip.block(0, block(attn=1, heads=4, qk=24, v=24)) == pytest.approx(1.8)
    assert dip.at(full).qk == TABLE.at(full).qk
    assert total(dip.at(full), full) == pytest.approx(total(dip, full))
    model = small_vit()
    search = Search(model, limits(model, 0.7, "latency", latency=dip), 30, SolverConfig(every=1, snap=1e-2))
    noise_steps(model, search, 30)
    cost = total(dip, counts(uvc.structure_of(model)))
    assert 0.65 * search.limits[0].dense < cost <= search.limits[0].most


def test_tensors_cost_what_numbers_do():
    kept = Counts(attn=(1, 0.5), mlp=(1, 1), qk=(12, 6), v=(9, 3), neuron=(7, 30), heads=(3, 1))
    tensors = Counts(*(torch.tensor(part, dtype=torch.float64) for part in kept))
    assert float(total(TABLE, tensors)) == pytest.approx(total(TABLE, kept))
    assert TABLE.at(tensors) == TABLE.at(kept)


def test_a_table_survives_json(tmp_path):
    (tmp_path / "table.json").write_text(TABLE.to_json())
    assert LatencyTable.load(tmp_path / "table.json") == TABLE


def broken():
    data = json.loads(TABLE.to_json())
    return {
        "no JSON": "{",
        "another object": "[1]",
        "a key missing": json.dumps({k: v for k, v in data.items() if k != "mlp"}),
        "a row too short": json.dumps({**data, "attn": data["attn"][:-1]}),
        "a time that falls": json.dumps({**data, "mlp": [0.2, 1.0, 0.9, 2.0]}),
        "a time that is none": json.dumps({**data, "mlp": [0.2, 1.0, 1.5, float("nan")]}),
        "a word for a time": json.dumps({**data, "mlp": [0.2, 1.0, 1.5, "long"]}),
    }


@pytest.mark.parametrize("fault", broken())
def test_a_file_that_is_no_table_is_one_line(fault, tmp_path):
    (tmp_path / "table.json").write_text(broken()[fault])
    with pytest.raises(ValueError, match=r"table\.json' is no latency table: .*measure it again") as error:
        LatencyTable.load(tmp_path / "table.json")
    assert "\n" not in str(error.value)


def test_a_table_of_another_model_is_refused():
    TABLE.check(small_vit())
    with pytest.raises(ValueError, match="measure this model"):
        TABLE.check(small_vit(depth=2))


def test_a_latency_budget_needs_a_table_and_one_that_can_be_met():
    model = small_vit()
    with pytest.raises(ValueError, match="needs a table"):
        limits(model, 0.5, "latency")
    smallest = 1.0 / total(TABLE, counts(Structure.dense(model)))
    with pytest.raises(ValueError, match=f"is below {smallest:.4f}, the smallest reachable latency"):
        limits(model, 0.01, "latency", TABLE)


def test_what_latency_can_reach_is_said_beside_the_linear_metrics():
    model = small_vit()
    macs, params, time = reachable(model, TABLE)
    assert [line.metric for line in (macs, params, time)] == ["macs", "params", "latency"]
    assert time.dense == pytest.approx(1.0 + 3 * (3.0 + 2.0)) and time.skipped == 1.0 / time.dense
    assert time.thin == pytest.approx((1.0 + 3 * (0.8 + TABLE._mlp(1))) / time.dense)


def fits(model, extra):
    """Whether some unit more of a block that runs, in a kept head, would keep the latency within `most`."""
    dense, most = counts(Structure.dense(model)), extra
    kept = counts(uvc.structure_of(model))
    for i, now in enumerate(map(BlockCounts._make, zip(*kept, strict=True))):
        whole = now.heads * 6
        grown = [("qk", whole), ("v", whole)] if now.attn else []
        grown += [("neuron", dense.neuron[i])] if now.mlp else []
        for name, size in grown:
            if getattr(now, name) < size:
                more = now._replace(**{name: getattr(now, name) + 1})
                if total(TABLE, kept) - TABLE.block(i, now) + TABLE.block(i, more) <= most:
                    return True
    return False


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_a_search_meets_a_latency_budget_and_no_unit_fits(budget):
    model = small_vit()
    search = Search(
        model, limits(model, budget, "latency", latency=TABLE), 40, SolverConfig(every=1, snap=1e-2)
    )
    noise_steps(model, search, 40)
    most = budget * total(TABLE, counts(Structure.dense(model)))
    assert total(TABLE, counts(uvc.structure_of(model))) <= most
    assert not fits(model, most)


def test_latency_and_macs_can_be_limited_together():
    model = small_vit()
    budget = {"latency": 0.7, "macs": 0.5}
    search = Search(model, limits(model, budget, latency=TABLE), 40, SolverConfig(every=1, snap=1e-2))
    noise_steps(model, search, 40)
    dense = counts(Structure.dense(model))
    assert total(TABLE, counts(uvc.structure_of(model))) <= 0.7 * total(TABLE, dense)
    assert uvc.cost(model).macs <= 0.5 * uvc.costs.cost(model, Structure.dense(model)).macs


def test_measuring_finds_a_growing_table_of_the_model_and_leaves_it_alone(monkeypatch):
    model = small_vit().train()
    work = iter(range(10**6))

    def count(form, images, _):
        """A clock that sees the kept parameters of a form, with some noise."""
        assert not form.training and len(images) == 2
        return 1e-3 * uvc.costs.cost(form).params * (1 + 0.01 * (next(work) % 3))

    monkeypatch.setattr(latency_table, "pass_ms", count)
    before = uvc.structure_of(model)
    table = measure(model, batch=2, rounds=3)
    table.check(model)
    assert model.training and uvc.structure_of(model) == before
    assert table.batch == 2 and table.heads[-1] == 4 and table.dims[-1] == 6 and table.neurons[-1] == 40
    structure = Structure.random(model, 0.5, seed=1)
    for kept in (structure, Structure.dense(model), Structure.uniform(model, heads=0.5, neurons=0.3)):
        real = 1e-3 * uvc.costs.cost(model, kept).params
        assert total(table, counts(kept)) == pytest.approx(real, rel=0.05)
    small = uvc.compact(uvc.apply_structure(model, structure))
    check = verify(table, small_vit(), small, rounds=5)
    assert check.measured == pytest.approx(check.predicted, rel=0.05)


def test_forms_are_ragged_without_multiples_and_even_with_them():
    sizes = uvc.layers.sizes_of(small_vit(embed_dim=128, num_heads=4)).each[0]
    ragged, even = latency_table._attn_form(sizes, 4, 16, 1), latency_table._attn_form(sizes, 4, 16, 16)
    lengths = [(len(q), len(v)) for q, v in zip(ragged.qk_dims, ragged.v_dims, strict=True)]
    assert len(set(lengths)) == 4 and all(q != v and q + v == 32 for q, v in lengths)
    assert {len(d) for d in even.qk_dims + even.v_dims} == {16}
    assert latency_table._grid(64, 16, 4) == (16, 32, 48, 64)
    assert latency_table._grid(768, 1, 4) == (191, 383, 575, 768)


KINDS = {
    "q/k dims in pairs": lambda: timm.create_model("vit_small_patch16_dinov3", **NARROW),
    "pairs, and neurons that all stay": lambda: timm.create_model("eva02_base_patch14_224", **NARROW),
    "heads that all stay": lambda: timm.create_model("cait_xxs24_224", **NARROW),
    "q/k dims that all stay": lambda: small_vit(qk_norm=True),
    "v dims and neurons that all stay": lambda: small_vit(scale_attn_norm=True, scale_mlp_norm=True),
}
NARROW = dict(img_size=28, patch_size=14, depth=2, embed_dim=32, num_heads=4, num_classes=5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:UVC")
def test_a_table_is_of_forms_that_the_layers_offer_and_prices_what_a_search_leaves(name, monkeypatch):
    model = KINDS[name]()
    monkeypatch.setattr(latency_table, "pass_ms", lambda form, *_: uvc.costs.cost(form).params)
    table = measure(model, rounds=1)
    table.check(model)
    for kept in (Structure.dense(model), Structure.random(model, 0.5, seed=1)):
        real = uvc.costs.cost(model, kept).params
        assert total(table, counts(kept)) == pytest.approx(real, rel=0.05)
    assert LatencyTable.from_json(table.to_json()) == table


@pytest.mark.slow
def test_a_latency_budget_of_deit_tiny_lands_within_five_percent_when_timed():
    """For a quiet machine: it measures for about a minute, on one thread."""
    dense = timm.create_model("deit_tiny_patch16_224")
    model = copy.deepcopy(dense)
    table = measure(model)
    config = SolverConfig(every=1, anneal=(0.0, 0.5), snap=1.0)
    search = Search(model, limits(model, 0.6, "latency", latency=table), 4, config)
    noise_steps(model, search, 4)
    check = verify(table, dense, uvc.compact(model))
    assert 0.59 < check.predicted <= 0.6
    assert check.measured == pytest.approx(0.6, rel=0.05)

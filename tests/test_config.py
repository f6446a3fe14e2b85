"""Settings: what each may hold, in Python and in TOML."""

import tomllib
from dataclasses import asdict, replace

import numpy as np
import pytest

from uvc.config import Config, DistillConfig, RunConfig, SolverConfig
from uvc.recipes import RECIPES
from uvc.settings import BadSetting, from_dict, to_toml


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Config(warmup_epochs=-1), "warmup_epochs: -1; it must be 0 or more"),
        (lambda: Config(search_epochs=1.5), "search_epochs: 1.5; it must be a whole number"),
        (lambda: Config(batch_size=0), "batch_size: 0; it must be 1 or more"),
        (lambda: Config(batch_size=True), "batch_size: True; it must be a whole number"),
        (lambda: Config(learning_rate=float("nan")), "learning_rate: nan; it must be a positive number"),
        (lambda: Config(threads=0), "threads: 0; it must be 1 or more"),
        (lambda: Config(solver="uvc"), "solver: 'uvc'; it must be a SolverConfig"),
        (lambda: DistillConfig(weight=1.1), "distill weight: 1.1; it must be in [0, 1]"),
        (lambda: DistillConfig("none", features=1.0), "distill features: 1.0 has no teacher"),
        (lambda: SolverConfig(tokens=4), "solver tokens: 4; it must be 0 to 3"),
        (lambda: SolverConfig(anneal=(0.1,)), "solver anneal: (0.1,); it must be a list of 2 values"),
        (lambda: SolverConfig(families=("tail",)), "solver families: 'tail'; known are 'qk', 'v', 'neuron'"),
        (lambda: SolverConfig(round_to=(0, 1)), "solver round_to: 0; it must be 1 or more"),
        (lambda: RunConfig(budget=1.5), "budget: 1.5 is not a fraction in (0, 1]"),
        (lambda: RunConfig(budget="half"), "budget: 'half'; it must be a number"),
        (lambda: RunConfig(budget={"joules": 0.5}), "metric must be one of macs, params, latency"),
        (lambda: RunConfig(latency_batch=2), "latency_batch: 2, but no budget is in latency"),
        (
            lambda: RunConfig(metric="latency", latency_batch=2, latency_table="t.json"),
            "latency_batch: 2, but the latency table has its own",
        ),
        (lambda: RunConfig(model_args={"f": print}), "model_args: <built-in function print>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_out_of_range_is_refused_as_the_config_is_made(make, says):
    with pytest.raises(BadSetting) as caught:
        make()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives_toml(recipe):
    run = RunConfig(
        budget={"macs": 0.5, "params": 1},
        model_args={"img_size": 112, "window": [7, 7], "name": 'a "quoted"\n\x7f ünïcödé 🙂', "on": False},
        training=RECIPES[recipe](),
    )
    assert from_dict(RunConfig, tomllib.loads(to_toml(run))) == run


def test_an_unknown_setting_is_named_by_its_path():
    with pytest.raises(BadSetting, match=r"^training\.solver\.tail: no such setting; known are method, "):
        from_dict(RunConfig, {"training": {"solver": {"tail": 1}}})
    with pytest.raises(BadSetting, match=r"^training\.distill\.kind: 'loud'; known are 'none', "):
        from_dict(RunConfig, {"training": {"distill": {"kind": "loud"}}})


def test_the_former_name_of_a_setting_still_works():
    config = SolverConfig(grain=(2, 4))
    assert config == SolverConfig(round_to=(2, 4)) and config.grain == (2, 4)
    assert replace(SolverConfig(round_to=(1, 8)), grain=(2, 4)) == config
    assert replace(config, tokens=1).round_to == (2, 4) and "grain" not in asdict(config)
    assert from_dict(SolverConfig, {"grain": [2, 4]}) == config


def test_scalars_of_numpy_become_plain_ones():
    config = Config(batch_size=np.int64(8), mixup=np.float32(0.5))
    assert type(config.batch_size) is int and type(config.mixup) is float

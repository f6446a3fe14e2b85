"""The gates of the training step, on one thread: `pytest bench`. Too slow and fickle for every test run."""

import pytest
import torch
from bench_step import run


@pytest.fixture(scope="module")
def times():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {way: result.ms for way, result in run().items()}
    torch.set_num_threads(before)


def test_skipping_on_the_fly_costs_about_what_the_compacted_model_costs(times):
    assert times["on_the_fly"] <= 1.08 * times["compacted"]


def test_half_the_structure_takes_at_most_three_fifths_of_the_dense_step(times):
    assert times["on_the_fly"] <= 0.60 * times["dense"]


def test_a_converted_model_with_nothing_pruned_costs_nothing(times):
    assert times["converted"] <= 1.03 * times["dense"]

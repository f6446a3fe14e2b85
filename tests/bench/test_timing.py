"""Interleaved timing and its noise band, with a clock that the test turns."""

import numpy as np
import pytest
import torch

from uvc.bench.timing import FLOOR, Round, Timing, percentile, ratio

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passing(self, seconds, log=None, name=None):
        def call(_):
            self.now += seconds
            if log is not None:
                log.append(name)

        return call


def test_medians_are_per_call_however_often_a_call_is_repeated():
    clock = Clock()
    calls = {"long": clock.passing(0.5), "short": clock.passing(0.0001)}
    times = Round(calls, CPU, clock=clock)
    for _ in range(3):
        times.run()
    found = times.timings()
    assert found["long"].ms == pytest.approx(500) and found["short"].ms == pytest.approx(0.1)
    assert len(found["short"].samples) == 3


def test_every_second_round_goes_backwards():
    clock, log = Clock(), []
    calls = {name: clock.passing(1.0, log, name) for name in "abc"}
    times = Round(calls, CPU, clock=clock)
    log.clear()
    for _ in range(2):
        times.run()
    assert "".join(log) == "abccba"


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_percentiles_are_those_of_numpy(count, share):
    samples = tuple(np.random.default_rng(count).normal(size=count))
    assert percentile(samples, share) == pytest.approx(np.quantile(samples, share))


def test_a_machine_that_drifts_does_not_move_the_ratio():
    drift = np.linspace(1, 3, 9)
    speedup, band = ratio(Timing(tuple(2.0 * drift), "wall"), Timing(tuple(1.0 * drift), "wall"))
    assert speedup == pytest.approx(2.0) and band == pytest.approx(FLOOR)


def steady(random, rounds):
    return random.normal(size=rounds)


def coming_and_going(random, rounds):
    """What slows a round slows the next by 70% of it."""
    noise = [random.normal()]
    for _ in range(rounds - 1):
        noise.append(0.7 * noise[-1] + (1 - 0.7**2) ** 0.5 * random.normal())
    return np.array(noise)


@pytest.mark.parametrize("rounds", [5, 9])
@pytest.mark.parametrize(("load", "share"), [(steady, 0.97), (coming_and_going, 0.85)])
def test_two_runs_agree_within_the_band_nearly_always(load, share, rounds):
    random, agree, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        found = []
        for _ in range(2):
            other = np.exp(0.1 * load(random, rounds))
            found.append(ratio(Timing((2.0,) * rounds, "wall"), Timing(tuple(other), "wall")))
        (a, band), (b, _) = found
        # The floor would hide what the samples say.
        agree += abs(b - a) <= a * (band - FLOOR)
    assert agree >= share * runs


def test_the_band_tells_a_real_change_from_noise():
    random = np.random.default_rng(1)
    base, slower = (mean * np.exp(0.02 * random.normal(size=11)) for mean in (1.0, 1.3))
    speedup, band = ratio(Timing(tuple(base), "wall"), Timing(tuple(slower), "wall"))
    assert speedup < 1 - band

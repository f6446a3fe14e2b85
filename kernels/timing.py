"""Milliseconds of calls that take turns, so that a machine whose speed drifts slows all of them."""

import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]  # seconds
Timer = Callable[[], float]  # milliseconds


def wait(device: torch.device) -> None:
    """Until `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """What `call` takes until `device` is done."""
    wait(device)
    start = clock()
    call()
    wait(device)
    return 1e3 * (clock() - start)


def turn(timers: Mapping[str, Timer], count: int) -> dict[str, float]:
    """What each timer says, once; every second round goes backwards, so that none always follows another."""
    return {name: timers[name]() for name in (timers if count % 2 == 0 else reversed(timers))}


def take_turns(
    timers: Mapping[str, Timer], rounds: int, warm_up: int = 1, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """What each says in `rounds` rounds after some that warm up; it ends after `seconds`, but for three."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for count in range(warm_up):
        turn(timers, count)
    start = time.monotonic()
    for count in range(rounds):
        if count >= 3 and time.monotonic() - start > seconds:
            break
        for name, ms in turn(timers, count).items():
            samples[name].append(ms)
    return samples

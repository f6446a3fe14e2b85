"""What every test gets: one thread, one seed, no leftover backend, and no choice by measurement."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_conditions(monkeypatch):
    monkeypatch.delenv("UVC_BACKEND", raising=False)
    # What serves must not depend on timings, nor on what an earlier run left in the user's cache.
    monkeypatch.setenv("UVC_MEASURE", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

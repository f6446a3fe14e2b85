"""What every test gets: one thread, one seed, and no leftover backend from the caller's environment."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_conditions(monkeypatch):
    monkeypatch.delenv("UVC_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

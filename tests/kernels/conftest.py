"""Kernel tests run with NaN in every tensor that torch hands out uninitialised."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """An entry that a kernel forgets to write is NaN, and fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]

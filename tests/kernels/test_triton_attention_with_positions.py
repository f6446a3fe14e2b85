"""Positions on Triton: tiles of every kind. What is the same for every packing backend stands in
`test_packed_attention_with_positions.py`.
"""

import pytest
import torch
from on_triton import DEVICE, check
from test_every_backend import attend_with_positions, positions_case


@pytest.mark.parametrize(
    ("tokens", "dims", "dtype"),
    [
        (35, 64, torch.float32),
        (65, 16, torch.bfloat16),
        (130, 32, torch.bfloat16),
        (70, 128, torch.bfloat16),
        pytest.param(209, 64, torch.float16, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        pytest.param(300, 64, torch.bfloat16, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
    ids=str,
)
def test_every_kind_of_tile_is_right(tokens, dims, dtype):
    tensors, kept, positions = positions_case(
        "tables and a bias", tokens, DEVICE, dims, torch.ones(2, 3, dims, dtype=torch.bool)
    )
    tensors[0], tensors[5] = tensors[0][:2], tensors[5][:1]
    check(attend_with_positions(kept, positions), tensors, dtype)

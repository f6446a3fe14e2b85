"""AdamW over the rows that are not at rest: torch's bits, and what is passed over."""

import pytest
import torch
import uvc_kernels
from uvc_kernels.adamw import AT_REST, REMOVED, STEPPED, adamw_reference, passes_over_rows

pytestmark = pytest.mark.skipif(not passes_over_rows(), reason="torch serves: the op or its bits are missing")


@pytest.fixture
def state():
    weight = torch.randn(70, 48)
    weight[::3] = 0.0
    rows = torch.zeros(70, dtype=torch.uint8)
    rows[::3] = REMOVED
    return [weight, torch.zeros_like(weight), torch.zeros_like(weight), rows]


def run(function, state, steps, decay=0.05):
    weight, first, second, rows = (t.clone() for t in state)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        size = 10.0 ** torch.randint(-20, 2, weight.shape, generator=generator)
        grad = size * torch.randn(weight.shape, generator=generator)
        grad[::3] = 0.0
        lists = ([t] for t in (weight, grad, first, second, rows))
        function(*lists, [step], 1e-3, (0.9, 0.999), decay, 1e-8)
    return weight, first, second, rows


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_every_bit_is_that_of_torch(state, decay, threads):
    torch.set_num_threads(threads)
    expected, found = (run(f, state, 40, decay) for f in (adamw_reference, uvc_kernels.adamw))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert expected[0].ne(state[0]).any(1).sum() == (state[3] == STEPPED).sum()


def test_a_long_run_of_rows_at_rest_is_not_even_read(state):
    weight, first, second, rows = state
    weight[10:60], rows[10:60] = 0.0, REMOVED
    lists = [[t] for t in (weight, torch.full_like(weight, 1e-3), first, second, rows)]
    lists[1][0][rows == REMOVED] = 0.0
    uvc_kernels.adamw(*lists, [1], 1e-3)
    assert rows[10:60].eq(AT_REST).all()
    lists[1][0][10:60] = float("nan")
    uvc_kernels.adamw(*lists, [2], 1e-3)
    assert not weight[10:60].any() and not first[10:60].any() and weight.isfinite().all()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["weight", "exp_avg", "exp_avg_sq"])
def test_a_removed_row_with_anything_left_is_stepped_as_in_torch(state, which):
    state[which][3, 47] = 1e-30
    expected, found = (run(f, state, 9) for f in (adamw_reference, uvc_kernels.adamw))
    assert found[3][3] == REMOVED and found[3][6] == AT_REST
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


def test_lists_that_do_not_fit_are_refused(state):
    weight, first, second, rows = state
    with pytest.raises(RuntimeError, match="rows must be uint8"):
        uvc_kernels.adamw([weight], [weight], [first], [second], [rows[:3]], [1], 1e-3)
    with pytest.raises(RuntimeError, match="of one shape"):
        uvc_kernels.adamw([weight], [weight.t()], [first], [second], [rows], [1], 1e-3)

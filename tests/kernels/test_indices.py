"""The records of what is kept: positions, packed layout, one buffer."""

import pytest
import torch
import uvc_kernels
from uvc_kernels.indices import WIDTHS, counts_of


def masks(heads, dims, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(heads, dims, generator=generator) < keep for _ in range(2)]


def test_positions_are_listed_head_by_head():
    qk = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    v = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    kept = uvc_kernels.kept_heads(qk, v)
    assert kept.qk.tolist() == [1, 2] and kept.qk_offsets.tolist() == [0, 2, 2]
    assert kept.v.tolist() == [0, 2, 7] and kept.v_offsets.tolist() == [0, 2, 3]
    rows, columns = kept.rows.tolist(), kept.columns.tolist()
    assert rows == [1, 2, *[-1] * 6, 10, 11, *[-1] * 6, 18, 20, *[-1] * 6, 25, *[-1] * 7]
    assert columns == [0, 2, *[-1] * 6, 7, *[-1] * 7]
    assert kept.table.tolist() == [[0, 8, 16, 0, 8, 8], [8, 16, 24, 8, 0, 8]]
    assert counts_of(kept) == [2, 0, 0, 0]


@pytest.mark.parametrize(("heads", "dims"), [(1, 1), (3, 64), (12, 64), (16, 80), (2, 128)])
def test_packed_rows_and_whole_rows_are_inverse_to_each_other(heads, dims):
    qk, v = masks(heads, dims)
    kept, A = uvc_kernels.kept_heads(qk, v), heads * dims
    on = torch.cat([(qk & v.any(1, keepdim=True)).flatten()] * 2 + [v.flatten()])
    assert torch.equal(kept.whole_rows.flatten() >= 0, on) and torch.equal(kept.whole_columns >= 0, v)
    for index, whole in (
        (kept.rows, kept.whole_rows.flatten()),
        (kept.columns, kept.whole_columns.flatten()),
    ):
        places = (index >= 0).nonzero().flatten()
        assert torch.equal(whole[index[places].long()].long(), places)
        assert len(index) % 8 == 0
    assert torch.equal(
        kept.rows[-len(kept.columns) :], torch.where(kept.columns < 0, -1, kept.columns + 2 * A)
    )


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
def test_the_table_lists_every_head_once_by_width(keep):
    qk, v = masks(12, 64, keep)
    kept = uvc_kernels.kept_heads(qk, v)
    fields = kept.table.tolist()
    widths = [max(row[4:]) for row in fields]
    first = 0
    for width, below, count in zip(WIDTHS, (0, *WIDTHS), counts_of(kept), strict=False):
        assert all(below < w <= width for w in widths[first : first + count])
        first += count
    assert first == len(fields) == int(v.any(1).sum())
    assert torch.equal(kept.table[:, 2].argsort().argsort().int(), kept.order)
    for q, k, value, out, qk_width, v_width in fields:
        assert out == value - (len(kept.rows) - len(kept.columns))
        for start, width in ((q, qk_width), (k, qk_width), (value, v_width)):
            packed = kept.rows[start : start + width]
            found = packed[packed >= 0]
            # One head's rows and nothing else: all of one head, padded behind.
            assert len(set((found // 64).tolist())) <= 1 and width == -(-len(found) // 8) * 8


def test_a_head_wider_than_every_launch_is_in_none():
    mask = torch.ones(2, 136, dtype=torch.bool)
    mask[0, 8:] = False
    kept = uvc_kernels.kept_heads(mask, mask)
    assert counts_of(kept) == [1, 0, 0, 0] and len(kept.table) == 2
    assert kept.table[0, 4] == 8, "the narrow heads come first"


def test_kept_neurons_are_padded_and_invertible():
    kept = uvc_kernels.kept_neurons(torch.arange(20) % 7 == 2)
    assert kept.neurons.tolist() == [2, 9, 16] and kept.rows.tolist() == [2, 9, 16, *[-1] * 5]
    assert kept.whole.nonzero().numel() == 19 and kept.whole[[2, 9, 16]].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "record", [uvc_kernels.kept_heads(*masks(3, 8)), uvc_kernels.kept_neurons(masks(1, 9)[0][0])]
)
def test_moving_a_record_moves_one_buffer(record):
    moved = record.to("meta")
    assert {t.device.type for t in moved} == {"meta"}
    assert [(t.shape, t.dtype) for t in moved] == [(t.shape, t.dtype) for t in record]
    again = record.to("cpu")
    storage = again.flat.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == storage for t in again if t.numel())
    assert all(torch.equal(a, b) for a, b in zip(again, record, strict=True))


def test_masks_that_are_not_bool_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for qk, v in ((mask, mask.int()), (mask, mask[:1]), (mask[0], mask[0])):
        with pytest.raises(ValueError, match="kept_heads takes two bool masks"):
            uvc_kernels.kept_heads(qk, v)
    for wrong in (mask, mask[0].int()):
        with pytest.raises(ValueError, match="kept_neurons takes a bool mask"):
            uvc_kernels.kept_neurons(wrong)

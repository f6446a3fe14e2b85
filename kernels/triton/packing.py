"""Rows of one matrix, entries of a bias and columns of another by two indices: `gather` for one layer."""

from torch import Tensor

from . import gather as many


def gather(
    rows: Tensor | None, bias: Tensor | None, columns: Tensor | None, row_index: Tensor, column_index: Tensor
) -> list[Tensor | None]:
    """The gathered three; None stays None."""
    R, C = row_index.shape[0], column_index.shape[0]
    outs = [
        None if rows is None else rows.new_empty(R, rows.shape[1]),
        None if bias is None else bias.new_empty(R),
        None if columns is None else columns.new_empty(columns.shape[0], C),
    ]
    jobs = zip((rows, bias, columns), (row_index, row_index, column_index), (0, 0, 1), outs, strict=True)
    there = [job for job in jobs if job[0] is not None]
    if there:
        many.gather(*map(list, zip(*there, strict=True)))
    return outs

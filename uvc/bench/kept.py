"""Rows of a bench that are kept in a CSV, and a table of them in a page."""

import csv
from collections.abc import Mapping
from pathlib import Path

from uvc.io.files import write_text


def keep(row: Mapping[str, object], path: Path) -> None:
    """Add a row to a CSV, whose columns are those of its first row; ValueError for others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a+", newline="") as file:
        file.seek(0)
        writer = csv.DictWriter(file, list(row) if new else next(csv.reader(file)), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def put(page: Path, marks: tuple[str, str], text: str) -> None:
    """Write what stands between two marks of a page anew; what has not both is left alone."""
    begin, end = marks
    before, found, rest = page.read_text().partition(begin)
    _, ends, after = rest.partition(end)
    if found and ends:
        write_text(page, before + begin + text + end + after)

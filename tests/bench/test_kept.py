"""Rows of a bench in a CSV, and what stands between two marks of a page."""

import pytest

from uvc.bench.kept import keep, put


def test_rows_are_added_and_those_of_other_columns_refused(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    keep({"a": 1, "b": "x, y"}, path)
    keep({"b": 4, "a": 3}, path)
    assert path.read_text() == 'a,b\n1,"x, y"\n3,4\n'
    with pytest.raises(ValueError, match="c"):
        keep({"a": 5, "c": 6}, path)
    assert path.read_text().count("\n") == 3


def test_what_stands_between_marks_is_written_anew_and_a_page_without_them_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    for text, expected in (("a<b>old</b>c", "a<b>new</b>c"), ("a<b>old", "a<b>old"), ("none", "none")):
        page.write_text(text)
        put(page, ("<b>", "</b>"), "new")
        assert page.read_text() == expected

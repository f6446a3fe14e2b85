"""bench/runtimes.py: structures of half of the MACs, rows, and the table in the docs."""

import shutil

import pytest
import timm

import uvc
import uvc.models
from bench import runtimes


@pytest.mark.parametrize("kind", ["ragged", "even"])
def test_a_structure_comes_to_half_of_the_macs_from_below(kind):
    model = timm.create_model("uvc_vit_digits")
    found = runtimes.structure(model, kind)
    assert 0.47 < uvc.costs.cost(model, found).macs / uvc.cost(model).macs <= 0.5
    widths = {len(dims) for block in found.blocks for dims in block.v_dims}
    assert len(widths) == 1 if kind == "even" else len(widths) > 1


def test_every_case_is_timed_and_kept_and_the_latest_counts(tmp_path, capsys):
    to = tmp_path / "rows.csv"
    arguments = ["--models", "uvc_vit_digits", "--batch", "1", "--threads", "1", "--runtimes", "eager"]
    for _ in range(2):
        assert runtimes.main([*arguments, "--seconds", "0", "--to", str(to)]) == 0
    assert len(to.read_text().splitlines()) == 5 and "ragged" in capsys.readouterr().out
    rows = runtimes.read(to)
    assert [r["structure"] for r in rows] == ["ragged", "even"]
    assert all(0 < float(r["low"]) <= float(r["ratio"]) <= float(r["high"]) for r in rows)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "old".join(runtimes.MARKS[1]) + "\nafter\n")
    runtimes.write_docs(page, to)
    assert f"**{float(rows[0]['ratio']):.3f}**" in page.read_text() and "old" not in page.read_text()


def test_what_compress_saves_has_a_column_of_its_own(tmp_path):
    to = tmp_path / "rows.csv"
    for form in ("auto", "grouped"):
        what = {"model": "m", "structure": "even", "share": 0.8, "form": form, "macs": 0.8, "batch": 1,
                "threads": 1, "runtime": "eager"}  # fmt: skip
        runtimes.keep(runtimes.row(what, [2.0] * 5, [1.0 if form == "auto" else 3.0] * 5), to)
    text = runtimes.table(runtimes.read(to))
    assert "eager, dense ms | ratio | eager, grouped, dense ms | ratio" in text
    assert "| m | even | 0.8 | 1 | 1 | 2.0 | **0.500** | 2.0 | **1.500** |" in text


def test_the_table_in_the_docs_is_that_of_the_rows(tmp_path):
    page = shutil.copy(runtimes.PAGE, tmp_path / "export.md")
    runtimes.write_docs(page, runtimes.ROOT / "results" / "amd-epyc" / "runtimes.csv")
    assert page.read_text() == runtimes.PAGE.read_text()

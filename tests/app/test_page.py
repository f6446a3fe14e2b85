"""uvc report --html: one well-formed page that asks for nothing else and says what is missing."""

import json
from html.parser import HTMLParser

import pytest
from oracle import small_vit, structures

import uvc
from uvc.app.page import write_page
from uvc.cli import run

VOID = {"meta", "link", "br"}
HOSTILE = """<script>alert("x")</script>'&{{ 7 * 7 }}"""


class Page(HTMLParser):
    """Tags that are open, addresses that are asked for, and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asks, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.asks += [value for name, value in attributes if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def folder_of(path, **changes):
    """The folder of a finished run."""
    model = small_vit(num_classes=5)
    small = uvc.compact(uvc.apply_structure(model, structures(model)["halves skipped in turn"]))
    uvc.save(small, path)
    structure = uvc.structure_of(small).to_json()
    summary = {
        "model": "a_vit", "data": "digits", "seed": 41, "budget": 0.5, "metric": "macs",
        "dense_macs": 2_000_000, "final_macs": 987_000, "macs_ratio": 0.4935,
        "dense_params": 30_000, "final_params": 15_100, "teacher_top1": 97.25, "final_top1": 96.5,
        "steps": 77, "device": "cpu", "structure": json.loads(structure),
        "latency": [{"batch": 1, "teacher_ms": 4.0, "compressed_ms": 2.98}],
        "block_ms": {
            "batch": 1, "compressed": [[0.5, 0.25, 0.125]] * 3, "teacher": [[1.0, 0.5, 0.25]] * 3,
        },
        "versions": {"torch": "9.8.7"},
        "budgets": [{"budget": 0.25, "macs_ratio": 0.2497, "final_top1": 91.75}],
    }  # fmt: skip
    (path / "structure.json").write_text(structure)
    (path / "summary.json").write_text(json.dumps({**summary, **changes}))
    lines = [
        {"phase": "search", "step": s, "target": 1 - s / 10, "soft_cost": 1.0, "z": s, "y_qk": 1.0}
        for s in range(5)
    ]
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"phase": "sea')
    return path


def test_the_page_of_several_runs_stands_alone_and_holds_their_figures(tmp_path, capsys):
    first = folder_of(tmp_path / "a")
    second = folder_of(tmp_path / "b", final_top1=88.25, final_macs=1_234_000, macs_ratio=0.617, seed=43)
    assert run(["report", str(first), str(second), "--html", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert (
        set(page.asks) == {"data:,"} and "http" not in text and "@import" not in text and "url(" not in text
    )
    assert "script" not in page.tags
    for figure in (
        "96.50",
        "-0.75",
        "987.000 k",
        "88.25",
        "-9.00",
        "1.234 M",
        "2.98",
        "41",
        "43",
        "9.8.7",
        "91.75",
    ):
        assert figure in page.text, figure
    # Accuracy over cost and latency; per run a structure, its MACs and three charts.
    assert page.tags.count("svg") == 2 + 2 * 6 and "Not in the folder" in page.text
    assert page.text.count("attention skipped") == 4 and str(first) in page.text


def test_hostile_names_are_text(tmp_path):
    folder = folder_of(tmp_path / "a<b>&", model=HOSTILE, data=HOSTILE, versions={HOSTILE: HOSTILE})
    lines = [{"phase": "search", "step": s, f"y_{HOSTILE}": s} for s in range(3)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_page([folder], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags
    assert page.text.count(HOSTILE) >= 4


def test_what_a_folder_lacks_is_said(tmp_path):
    folder = folder_of(tmp_path / "a", latency=None, versions=None, teacher_top1=None)
    for name in ("log.jsonl", "model.safetensors"):
        (folder / name).unlink()
    write_page([folder], tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    for said in (
        "curves of the search",
        "picture of the structure",
        "versions of",
        "run.json",
        "not recorded",
    ):
        assert said in text, said
    assert "batch 1: 1 of 1 runs do not say it" in text


def test_how_the_model_runs_is_shown_where_it_was_measured(tmp_path):
    folder = folder_of(tmp_path / "a")
    assert run(["compact", str(folder)]) == 0
    write_page([folder], tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    found = json.loads((folder / "compact.json").read_text())
    assert "MACs executed" in text and f"{found['ms']['after']:.2f} after" in text
    (folder / "compact.json").write_text("{}")
    write_page([folder], tmp_path / "page.html")
    assert "not recorded after" in Page((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize("place", ["folder", "file/page.html"])
def test_a_page_that_cannot_be_written_is_one_line(place, tmp_path, capsys):
    folder = folder_of(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert run(["report", str(folder), "--html", str(tmp_path / place)]) == 2
    assert "--html" in capsys.readouterr().err


def test_the_milliseconds_of_each_block_stand_beside_its_macs(tmp_path):
    write_page([folder_of(tmp_path / "a")], tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "Where the MACs go" in text and "Where the milliseconds go" in text
    assert text.count("50%") >= 3 and "the milliseconds of each block" not in text


@pytest.mark.parametrize("found", [None, [], {"compressed": [[1, 2, "x"]], "teacher": [[1, 2, 3]]}], ids=str)
def test_milliseconds_that_are_not_there_are_said_to_be_missing(found, tmp_path):
    write_page([folder_of(tmp_path / "a", block_ms=found)], tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "Where the milliseconds go" not in text and "the milliseconds of each block" in text

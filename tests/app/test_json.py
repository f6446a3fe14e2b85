"""What commands print for programs: JSON alone on stdout, no colour without a terminal or under NO_COLOR."""

import json
import re
import shutil

import pytest
from cli_runs import summary

import uvc
from uvc import cli
from uvc.app import doctor

COLOUR = re.compile(r"\x1b\[(\d+;)*(3|4|9|10)[0-7]m")


def printed(arguments, capsys):
    """What a command that went well printed on stdout, as JSON."""
    assert cli.run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_report_gives_the_summaries(folder, tmp_path, capsys):
    found = printed(["report", folder, folder, "--html", tmp_path / "page.html"], capsys)
    assert found["runs"] == [{"folder": str(folder), **summary(folder)}] * 2
    assert found["html"] == str(tmp_path / "page.html") and (tmp_path / "page.html").is_file()


def test_compress_gives_the_summary(folder, capsys):
    found = printed(["compress", "--resume", "--out", folder], capsys)
    assert found == {"folder": str(folder), **summary(folder)}


def test_eval_gives_its_figures(folder, capsys):
    found = printed(["eval", folder], capsys)
    assert found["top1"] == pytest.approx(summary(folder)["final_top1"]) and found["images"] == 500
    assert found["macs"] == summary(folder)["final_macs"] and found["folder"] == str(folder)


def test_compact_gives_what_it_measured(folder, capsys):
    found = printed(["compact", folder, "--for", "cpu,batch=2"], capsys)
    assert found == {"folder": str(folder), **json.loads((folder / "compact.json").read_text())}
    assert found["batch"] == 2 and len(found["blocks"]) == len(uvc.load(folder).blocks)


def test_doctor_gives_every_check(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "rate", lambda dtype: 12.5)
    monkeypatch.setattr(doctor, "_check", lambda op, provider, dtype: ("ok", 1e-7, ""))
    found = printed(["doctor"], capsys)
    assert "torch" in found["machine"] and found["gflops"][0] == {
        "threads": 1, "float32": 12.5, "bfloat16": 12.5,
    }  # fmt: skip
    assert {row["provider"] for row in found["self_checks"]} >= {"reference", "cpu"}
    assert all(row["verdict"] == "ok" and row["error"] == 1e-7 for row in found["self_checks"])


def test_a_fault_leaves_stdout_empty(tmp_path, capsys):
    assert cli.run(["report", str(tmp_path), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


def test_without_a_terminal_tables_are_plain_and_whole(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.run(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "…" not in said
    assert f"{summary(folder)['final_top1']:.2f}" in said


def test_no_color_is_heeded_in_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.run(["report", str(folder)]) == 0
    assert "\x1b" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.run(["report", str(folder)]) == 0
    assert not COLOUR.search(capsys.readouterr().out)

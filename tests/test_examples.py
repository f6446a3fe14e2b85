"""The examples run."""

import runpy
import sys
from pathlib import Path

import timm
from cli_runs import uvc_test_vit

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_drop_in_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "drop_in_layers.py"))
    shown = capsys.readouterr().out
    assert float(shown.split("outputs differ by ")[1]) < 1e-4


def test_compression_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compress_digits.py", "1"])
    monkeypatch.setattr(timm, "create_model", lambda _name: uvc_test_vit())
    runpy.run_path(str(EXAMPLES / "compress_digits.py"))
    assert "first test digits: [" in capsys.readouterr().out

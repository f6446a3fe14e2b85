"""The examples run, each as a program of its own would, and say what they should."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from cli_runs import uvc_test_vit

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each prints, in order.
SAYS = {
    "drop_in_layers": r"outputs differ by \d\.\de-0[4-9]",
    "compress_in_20_lines": r"% at 0\.(49\d\d|5000) of the MACs",
    "own_data": r"% at 0\.(39\d\d|4000) of the MACs(.|\n)*refused: train_loader: it yields no batch",
    "own_loss": r"cosine [01]\.\d+ after the search, [01]\.\d+ at the end",
    "resume": r"interrupted in the search\nfinished after \d+ steps with 0\.(49\d\d|5000)",
    "elastic_budgets": r"0\.(69\d\d|7000) of(.|\n)*0\.(39\d\d|4000) of(.|\n)*differs by \d\.\de-0[5-9]",
    "export_onnx": r"model\.onnx: outputs differ by \d\.\de-0[4-9]",
    "latency_budget": r"0\.[67]\d\d of the time predicted",
}
ARGUMENTS = {"latency_budget": ["1"]}
NEEDS = {"export_onnx": ("onnx", "onnxscript", "onnxruntime")}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name, capsys, monkeypatch):
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {' '.join(NEEDS[name])}")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *ARGUMENTS.get(name, ())])
    monkeypatch.setenv("UVC_MEASURE", "0")
    started = time.process_time()
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    seconds = time.process_time() - started
    shown = capsys.readouterr().out
    print(f"{name}: {seconds:.1f} s of processor time")
    assert re.search(SAYS[name], shown), shown


def test_compression_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compress_digits.py", "1"])
    monkeypatch.setattr(timm, "create_model", lambda _name: uvc_test_vit())
    runpy.run_path(str(EXAMPLES / "compress_digits.py"))
    assert "first test digits: [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("match_features", r"0\.(49|50) of the MACs; maps \[\(2, 96, 4, 4\), \(2, 96, 4, 4\)\]"),
        ("segment", r"0\.(49|50) of the MACs; compacted outputs differ by \d\.\de-0[4-9]"),
    ],
)
def test_an_example_without_labels_of_images_runs(name, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "1"])
    monkeypatch.setenv("UVC_MEASURE", "0")
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert re.search(says, shown := capsys.readouterr().out), shown


def test_two_processes_find_one_structure():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UVC_MEASURE": "0"}
    command += [str(EXAMPLES / "two_processes.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    kept = re.findall(r"rank (\d) keeps (\d+) neurons", run.stdout)
    assert sorted(rank for rank, _ in kept) == ["0", "1"] and len({count for _, count in kept}) == 1


def test_every_example_is_run_and_shown():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    elsewhere = {"match_features", "segment"}  # run by the tests of what they show
    assert names == {*SAYS, *elsewhere, "compress_digits", "two_processes", "digits_task"}
    assert all(f'"{name}.py"' in page for name in names)

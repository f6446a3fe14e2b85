"""The command line: one line per mistake that leaves nothing behind, and commands without a run."""

import os
import subprocess
import sys

import pytest
import torch
from cli_runs import SHORT, uvc_test_vit
from PIL import Image
from safetensors.torch import save_file

from uvc import cli

# Words of the command line, and what the line must name: the argument and the value. HERE: the test's folder.
MISTAKES = {
    "a budget of zero": ("--budget 0", "--budget", "0"),
    "a budget above one": ("--budget 1.5", "--budget", "1.5"),
    "a budget of nan": ("--budget nan", "--budget", "nan"),
    "a budget that is no number": ("--budget half", "--budget", "half"),
    "budgets that do not descend": ("--budget 0.4,0.5", "--budget", "0.4, 0.5 must descend"),
    "budgets one of which is no number": ("--budget 0.5,half", "--budget", "0.5,half"),
    "budgets one of which is none": ("--budget 0.5,0", "--budget", "0"),
    "budgets of which the smallest cannot be met": ("--budget 0.7,0.0001", "budget", "0.0001"),
    "several budgets and tokens": ("--budget 0.7,0.5 --tokens 2", "tokens", "several budgets keep all"),
    "a budget for an unknown metric": ("--budget macs=0.5,joules=0.4", "metric", "joules"),
    "one of two budgets below the smallest reachable": (
        "--budget macs=0.5,params=0.0001",
        "budget",
        "params",
    ),
    "a budget below the smallest reachable": ("--budget 0.0001", "budget", "0.0001"),
    "features without a teacher": ("--distill none --distill-features 1", "--distill-features", "no teacher"),
    "tokens at too many blocks": ("--tokens 4", "--tokens", "4"),
    "tokens without a budget that counts them": ("--tokens 2 --metric params", "tokens", "params"),
    "an unknown metric": ("--metric joules", "--metric", "joules"),
    "a latency table that is not there": (
        "--metric latency --latency-table HERE/none.json",
        "latency table",
        "none.json",
    ),
    "a latency table without a budget in latency": (
        "--latency-table HERE/file",
        "--latency-table",
        "add metric latency",
    ),
    "one multiple instead of two": ("--round-to 16", "--round-to", "16"),
    "a multiple that does not divide the model": ("--round-to 5,8", "round_to", "5"),
    "an unknown model": ("--model deit_tiny_patch16_225", "--model", "deit_tiny_patch16_224"),
    "an unsupported model": ("--model resnet10t", "model", "ResNet"),
    "an unknown data set": ("--data no_such_data", "data", "no_such_data"),
    "an unknown device": ("--device abacus", "--device", "abacus"),
    "a device torch knows and we do not": ("--device mps", "--device", "mps"),
    "an unknown recipe": ("--recipe cake", "--recipe", "cake"),
    "a negative seed": ("--seed -1", "--seed", "-1"),
    "a learning rate of nan": ("--lr nan", "--lr", "nan"),
    "a teacher cut short": ("--teacher HERE/torn.safetensors", "--teacher", "torn.safetensors"),
    "a teacher for other classes and no time to train it": (
        "--teacher HERE/other.safetensors --teacher-epochs 0",
        "--teacher",
        "head.weight",
    ),
    "a teacher that lacks weights": ("--teacher HERE/lacking.safetensors", "--teacher", "lacks"),
    "no such teacher": ("--teacher HERE/none", "--teacher", "none"),
    "an output that is a file": ("--out HERE/file", "--out", "file"),
    "an output below a file": ("--out HERE/file/x", "--out", "file"),
    "an output that nobody can write": ("--out /proc/uvc", "--out", "/proc/uvc"),
    "an output with other files": ("--out HERE/mine", "--out", "mine"),
    "nothing to resume": ("--resume", "--resume", "out"),
    "a model argument that the model does not take": ("--model-arg colour=3", "--model-arg", "colour"),
    "the number of classes as a model argument": ("--model-arg num_classes=3", "--model-arg", "num_classes"),
    "a setting out of range in a file": (
        "--config HERE/settings.toml",
        "settings.toml: training.ema_decay",
        "2; it must be in [0, 1)",
    ),
    "an unknown option": ("--bugdet 0.5", "--bugdet", "--budget"),
}


@pytest.fixture
def here(tmp_path):
    """A folder with files that are not what an option asks for."""
    save_file(uvc_test_vit().state_dict(), tmp_path / "torn.safetensors")
    os.truncate(tmp_path / "torn.safetensors", 5000)
    save_file(uvc_test_vit(num_classes=7).state_dict(), tmp_path / "other.safetensors")
    save_file({"cls_token": torch.zeros(1, 1, 24)}, tmp_path / "lacking.safetensors")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "settings.toml").write_text("training.ema_decay = 2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    return tmp_path


@pytest.mark.parametrize(("words", "argument", "value"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line_and_leaves_nothing_behind(words, argument, value, here, capsys):
    before = sorted(here.rglob("*"))
    # A second --out overrides the first.
    options = words.replace("HERE", str(here)).split()
    assert cli.run(["compress", "--out", str(here / "out"), *SHORT, *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("uvc: ")
    assert argument in shown.err and value in shown.err and "Traceback" not in shown.err
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_one_line(tmp_path, capsys):
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--device" in shown and "use cpu" in shown
    assert not (tmp_path / "out").exists()


def test_a_model_that_could_not_be_saved_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("uvc.io.serialization.MAKERS", {})
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--data", "digits"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "VisionTransformer" in shown
    assert not (tmp_path / "out").exists()


def test_data_without_a_model_of_its_own_needs_one(tmp_path, capsys):
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--data", "torch/cifar10"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--model" in shown and "torch/cifar10" in shown


def test_python_m_uvc_exits_with_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "uvc", "compress", "--out", str(tmp_path / "out"), "--budget", "1.5"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("command", ["eval", "report"])
@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_without_a_run_is_one_line(command, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.run([command, str(tmp_path / folder)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and folder in shown


def test_names_that_the_terminal_cannot_show_do_not_end_a_command(tmp_path):
    for part in ("train", "val"):
        for name in ("çà", "猫"):
            (tmp_path / "ö" / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "ö" / part / name / f"{part}.png")
    command = [sys.executable, "-m", "uvc", "data", str(tmp_path / "ö")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "problem: " in done.stdout and "\\u732b" in done.stdout


def test_no_command_shows_help(capsys):
    assert cli.run([]) == 0
    assert "compress" in capsys.readouterr().out

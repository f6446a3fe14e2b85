"""Weights & Biases and MLflow get what TensorBoard gets, counted in steps of the whole run."""

import json
import sys

import pytest
from cli_runs import SHORT, summary

from uvc import cli
from uvc.training.logger import RunLog

WANDB = """
calls, config = [], None


class Run:
    def log(self, values, step=None):
        assert all(isinstance(value, float) for value in values.values())
        calls.append((step, values))

    def finish(self):
        calls.append("finish")


class Config:
    def update(self, values, allow_val_change):
        calls.append(values)


def init(project):
    global config
    config = Config()
    calls.append(project)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module of the calls that Accelerate's tracker makes; it keeps them."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def points(wandb):
    return [call for call in wandb.calls if isinstance(call, tuple)]


def test_a_tracker_gets_settings_steps_and_accuracy_in_order(wandb, tmp_path):
    assert cli.run(["compress", "--out", str(tmp_path / "run"), "--tracker", "wandb", *SHORT]) == 0
    project, settings, *_, last = wandb.calls
    assert (project, last) == ("uvc", "finish")
    assert settings["budget"] == 0.5 and settings["solver.every"] == 2 and settings["freeze"] == "()"
    steps = [step for step, _ in points(wandb)]
    assert steps == sorted(steps) and steps[0] == 0
    # The last accuracy follows the last of the steps, those of the teacher among them.
    assert steps[-1] == 5 * (summary(tmp_path / "run")["steps"] // 4)
    named = {name for _, values in points(wandb) for name in values}
    assert {"teacher/loss", "search/hard_cost", "search/images_s", "post-train/top1"} <= named


def test_a_resumed_log_counts_on_from_the_phases_before(wandb, tmp_path):
    with RunLog(tmp_path, trackers=["wandb"]) as log:
        log.phase("teacher", 10)
        log.step(9, loss=1.0)
        log.phase("warmup", 20)
        log.step(5, loss=1.0)
    with RunLog(tmp_path, trackers=["wandb"]) as log:
        log.phase("warmup", 20)
        log.step(19, loss=2.0)
        log.phase("search", 20)
        log.step(0, loss=3.0)
    assert [step for step, _ in points(wandb)] == [9, 15, 29, 30]


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(wandb, tmp_path, monkeypatch):
    def fail(self, values, step=None):
        raise OSError("no route\nto host")

    monkeypatch.setattr(wandb.Run, "log", fail)
    with pytest.warns(UserWarning, match="wandb fails: no route to host; it gets no more of this run"):
        with RunLog(tmp_path, trackers=["wandb"]) as log:
            log.phase("search", 2)
            log.step(0, loss=1.0)
            log.step(1, loss=2.0)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2


def test_a_tracker_that_is_not_there_or_cannot_begin_is_one_line(wandb, tmp_path, monkeypatch, capsys):
    given = ["compress", "--out", str(tmp_path / "run"), *SHORT]
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with monkeypatch.context() as patch:
        patch.setattr("uvc.training.trackers.find_spec", lambda name: None)
        assert cli.run([*given, "--tracker", "mlflow"]) == 2
    shown = capsys.readouterr().err
    assert shown == "uvc: tracker: 'mlflow' is not installed; pip install mlflow-skinny, or leave it out\n"
    assert cli.run([*given, "--tracker", "comet"]) == 2
    assert "--tracker: 'comet'; known are 'wandb', 'mlflow'" in capsys.readouterr().err
    monkeypatch.setattr(wandb, "init", lambda project: 1 / 0)
    assert not (tmp_path / "run").exists()
    assert cli.run([*given, "--tracker", "wandb"]) == 2
    assert "uvc: tracker: wandb cannot begin: division by zero;" in capsys.readouterr().err


def test_weights_and_biases_itself_takes_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with RunLog(tmp_path / "run", trackers=["wandb"]) as log:
        log.configure({"budget": 0.5, "solver": {"every": 2}})
        log.phase("search", 2)
        log.step(0, loss=1.0)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"search/loss" in written.read_bytes()


def test_mlflow_itself_takes_a_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with RunLog(tmp_path / "run", trackers=["mlflow"]) as log:
        log.configure({"budget": 0.5, "solver": {"every": 2}})
        log.phase("search", 2)
        log.step(1, loss=1.5)
    (found,) = mlflow.search_runs(experiment_names=["uvc"], output_format="list")
    assert found.data.metrics == {"search/loss": 1.5} and found.data.params["solver.every"] == "2"
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["loss"] == 1.5

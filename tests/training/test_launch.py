"""What a launcher leaves out is said in one line; what it returns when a run is asked to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uvc import cli, environment
from uvc.training import processes


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_meeting_point_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, capsys, missing
):
    monkeypatch.setattr(processes, "_started", None)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert environment.launched() == 2
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"uvc: {missing}: it is not set, though 2 processes are to find one another")
    assert shown.count("\n") == 1 and not (tmp_path / "out").exists()


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
LAUNCH += [
    "--num_processes",
    "2",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "-m",
    "uvc",
    "compress",
]


def children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc").exists(), reason="children are found in /proc")
@pytest.mark.parametrize(
    ("sent", "to", "ignored", "returned"),
    [
        (signal.SIGTERM, "launcher", False, 1),
        (signal.SIGUSR1, "launcher", False, -signal.SIGUSR1),
        (signal.SIGUSR1, "processes", False, 0),
        (signal.SIGUSR1, "all", True, 0),
    ],
)
def test_a_signal_ends_all_processes_with_a_checkpoint_whatever_the_launcher_returns(
    tmp_path, sent, to, ignored, returned
):
    out = tmp_path / "out"
    options = ["--device", "cpu", "--data", "digits", "--teacher-epochs", "500", "--quiet", "--out", str(out)]
    trap = ["sh", "-c", 'trap "" USR1; exec "$@"', "sh"] if ignored else []
    run = subprocess.Popen([*trap, *LAUNCH, *options], stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    while run.poll() is None and not (log.exists() and '"step": 5' in log.read_text()):
        time.sleep(0.1)
    begun = children(run.pid)
    for process in begun if to != "launcher" else ():
        os.kill(int(process), sent)
    if to != "processes":
        run.send_signal(sent)
    said = run.communicate()[1]  # until all who could write there have ended
    assert run.returncode == returned and len(begun) == 2
    lines = [line for line in said.splitlines() if line.startswith("stopped in ")]
    assert len(lines) == 1 and lines[0].endswith(f"; continue with: uvc compress --resume --out {out}"), said
    assert (out / "teacher" / "checkpoint.safetensors").exists()

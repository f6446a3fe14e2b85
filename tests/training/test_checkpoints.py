"""Checkpoints: the last two, with checksums, written beside the training; a killed run loses nothing."""

import dataclasses
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from cli_runs import SHORT, summary
from gang import gang
from safetensors.torch import load_file
from short_runs import killed, run
from test_compress import CONFIG, digits_data, digits_model

from uvc import cli
from uvc.training import checkpoint
from uvc.training.checkpoint import Checkpoints, before_of, load_run
from uvc.training.compress import compress
from uvc.training.data import load_data
from uvc.training.trainer import Trainer


def part(value):
    return {"model": {"weight": torch.full((5, 3), float(value)), "steps": torch.tensor(value)}}


def spoil(path):
    """Changes one byte of the tensors."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def write(path, *values):
    for value in values:
        with Checkpoints(path) as checkpoints:
            checkpoints.save(part(value), {"value": value, "loader": {"at": torch.arange(value)}})


def test_what_is_written_is_what_was_there_when_saving_began(tmp_path, monkeypatch):
    begun, go_on, write_tensors = threading.Event(), threading.Event(), checkpoint.write_tensors

    def slow(*arguments):
        begun.set()
        go_on.wait(30)
        write_tensors(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    tensors, facts = part(1), {"history": [1]}
    with Checkpoints(tmp_path / "x.safetensors") as checkpoints:
        checkpoints.save(tensors, facts)
        assert begun.wait(30)
        tensors["model"]["weight"] += 1  # training goes on
        facts["history"].append(2)
        go_on.set()
    found, told = load_run(tmp_path / "x.safetensors")
    assert torch.equal(found["model"]["weight"], torch.ones(5, 3)) and told == {"history": [1]}


def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_stays(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    write(path, 1, 2, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == [before_of(path).name, path.name]
    assert Checkpoints(path).load()[1]["value"] == 3
    spoil(path)
    checkpoints = Checkpoints(path)
    with pytest.warns(
        UserWarning, match=r"its checksum is of other content.*; the run goes on from the one before"
    ):
        tensors, facts = checkpoints.load()
    assert facts["value"] == 2 and torch.equal(tensors["model"]["weight"], part(2)["model"]["weight"])
    with checkpoints:
        checkpoints.save(part(4), {"value": 4})
    assert load_run(path)[1]["value"] == 4 and load_run(before_of(path))[1]["value"] == 2
    for file in (path, before_of(path)):
        spoil(file)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Checkpoints(path).load()


def test_where_a_kill_came_between_there_is_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    write(path, 1, 2)
    path.unlink()
    assert Checkpoints(path).load()[1]["value"] == 1


def test_a_disk_that_is_too_small_is_said_before_run_and_checkpoint(tmp_path, monkeypatch, capsys):
    free = [10_000]
    monkeypatch.setattr(checkpoint, "_free", lambda folder: free[0])
    assert cli.run(["compress", "--out", str(tmp_path / "out"), *SHORT]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "has 0.0 MB free, the checkpoints of this run take" in shown
    assert not (tmp_path / "out").exists()
    free[0] = 1e9
    data, steps = digits_data(), []

    class Fills(list):
        def __iter__(self):
            for batch in data.train:
                steps.append(1)
                free[0] = 1e9 if len(steps) < 4 else 10_000
                yield batch

    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    loader = Fills([None] * len(data.train))
    with pytest.raises(OSError, match=r"cannot be written: 0\.0 MB are free, it takes 0\.\d MB"):
        compress(digits_model(), loader, data.val, 0.6, config=config, out=tmp_path)
    assert len(steps) == 4 and load_run(tmp_path / "checkpoint.safetensors")[1]["done"] == 2


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, t, facts: (saved.append(facts["done"]), save(self, t, facts))
    )
    data = digits_data()
    config = dataclasses.replace(CONFIG, search_epochs=0, post_epochs=0, checkpoint_minutes=1e-9)
    compress(digits_model(), data.train, data.val, 1.0, config=config, out=tmp_path)
    assert saved == [*range(1, len(data.train)), 0]  # after each step, and at the end of the epoch


def command(folder, arguments, sent=None, after=0.0, rank=0):
    """Runs a command, whose stderr goes to a file; perhaps this process gets a signal after some seconds."""
    file = os.open(folder / f"stderr{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 2)
    if sent is not None and rank == int(os.environ["RANK"]):
        timer = threading.Timer(after, os.kill, (os.getpid(), sent))
        timer.daemon = True
        timer.start()
    return cli.run(["compress", *arguments])


def said(folder, rank=0):
    return (folder / f"stderr{rank}").read_text()


def options(out, *more):
    return ["--out", str(out), "--seed", "3", *SHORT, "--resume", "auto", "--checkpoint-every", "1", *more]


def same_result(a, b):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    return summary(a)["structure"] == summary(b)["structure"] and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("count", "kills", "changes"),
    [
        (1, 1, {}),
        pytest.param(1, 25, {}, marks=pytest.mark.slow),
        pytest.param(2, 25, {}, marks=pytest.mark.slow),
        pytest.param(2, 6, {"fsdp": True}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path, count, kills, changes):
    chance, out = random.Random(kills), tmp_path / "out"
    changes = {"checkpoint_every": 1, **changes}
    whole = gang(count, run, tmp_path / "whole", changes)
    landed = ended = writing = 0
    while landed < kills or not ended:
        if landed < kills:
            # Every third while a checkpoint is written, which takes some milliseconds.
            writes = landed % 3 == 2
            after = chance.uniform(0, 0.02 if writes else 0.5)
            found = gang(count, killed, out, changes, chance.randrange(count), writes, after)
        else:
            found = gang(count, run, out, changes)
        if None in found:
            landed, writing = landed + 1, writing + writes
            # What is left says so in one line, unless it had come to its end.
            assert all(
                "lost another one" in said and "\n" not in said for said in found if isinstance(said, str)
            )
            continue
        for weights, structure in found:
            assert structure == whole[0][1]
            assert all((weights[name] == whole[0][0][name]).all() for name in weights)
        ended += 1
        shutil.rmtree(out)
    print(f"{landed} kills of {count} processes, {writing} in writing, {ended} runs ended")


def lose(folder, arguments, number, phase, step):
    """As `command`; the process of rank 1 gets a signal at a step."""
    train_step = Trainer._train_step

    def watched(self, *rest):
        if self.log._phase == phase and rest[-1].batch == step and os.environ["RANK"] == "1":
            (folder / "sent").write_text(str(time.time()))
            os.kill(os.getpid(), number)
        return train_step(self, *rest)

    Trainer._train_step = watched
    return command(folder, arguments)


def test_when_a_rank_is_killed_the_other_ends_in_one_line_and_the_run_resumes(tmp_path):
    out = tmp_path / "out"
    assert gang(2, lose, tmp_path, options(out), signal.SIGKILL, "search", 3) == [2, None]
    seconds = time.time() - float((tmp_path / "sent").read_text())
    print(f"the other has ended {seconds:.1f} s after the kill")
    assert seconds < 60
    line = said(tmp_path)
    assert line.count("\n") == 1 and line.startswith("uvc: process 0 of 2 has lost another one")
    assert line.endswith(f"continue with: uvc compress --resume --out {out}\n")
    assert gang(2, command, tmp_path, options(out)) == [0, 0]
    whole = tmp_path / "whole"
    assert gang(2, command, tmp_path, options(whole)) == [0, 0]
    assert same_result(whole, out)
    assert said(tmp_path, 1) == said(tmp_path) == ""


def test_a_signal_to_one_of_two_ends_both_with_0_and_another_number_goes_on(tmp_path):
    out = tmp_path / "out"
    assert gang(2, lose, tmp_path, options(out), signal.SIGUSR1, "search", 3) == [0, 0]
    assert said(tmp_path).startswith("stopped in search, epoch 0, after ") and said(tmp_path, 1) == ""
    done = load_run(out / "checkpoint.safetensors")[1]["done"]
    assert done in (4, 5)  # the step in which it came, or the next
    assert gang(1, command, tmp_path, options(out)) == [0]
    assert summary(out)["processes"] == 1


def test_a_batch_that_processes_cannot_share_is_one_line_before_anything_is_written(tmp_path):
    arguments = ["--out", str(tmp_path / "out"), *SHORT, "--batch-size", "215"]
    assert gang(2, command, tmp_path, arguments) == [2, 2]
    lines = said(tmp_path) + said(tmp_path, 1)
    assert lines.count("\n") == 1 and "batch_size: 215 images, which 2 processes cannot share" in lines
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_steps_leave_memory_files_and_threads_flat(tmp_path, monkeypatch):
    seen, train_step = [], Trainer._train_step

    def watched(self, *rest):
        if self.steps % 10 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((self.steps, pages, len(os.listdir("/proc/self/fd")), threading.active_count()))
        return train_step(self, *rest)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    data = load_data("digits", model_input=(1, 8, 8), batch_size=16, validation="val")
    epochs = {"warmup_epochs": 1, "search_epochs": 30, "post_epochs": 2}  # of 62 steps
    config = dataclasses.replace(CONFIG, checkpoint_every=100, **epochs)
    compress(digits_model(), data.train, data.val, 0.5, config=config, out=tmp_path)
    halves = [[row[1:] for row in seen if (row[0] >= 1000) is late] for late in (False, True)]
    # While a checkpoint is written there is a file and a thread more.
    (pages, *held), (then, *held_then) = (
        (max(p for p, *_ in half), min(f for _, f, _ in half), min(t for *_, t in half)) for half in halves
    )
    print(f"{seen[-1][0]} steps: {pages} pages, then {then}; files and threads {held}, then {held_then}")
    assert then < 1.02 * pages and held_then == held

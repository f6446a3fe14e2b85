"""A run that is stopped in the middle of an epoch and resumed ends with the weights of an unbroken one."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_compress import CONFIG, digits_data, digits_model
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import uvc
from uvc import cli
from uvc.training.checkpoint import load_run, save_run
from uvc.training.compress import compress
from uvc.training.data import TensorLoader
from uvc.training.logger import RunLog
from uvc.training.signals import Stopped, asked, stop_on_signals

SHORT = dataclasses.replace(CONFIG, warmup_epochs=1, search_epochs=2, post_epochs=2)
REGULARISED = dict(mixup=0.8, cutmix=1.0, ema_decay=0.9, label_smoothing=0.1)


class StopAt:
    """Batches of a loader; the process gets a signal while it works on one of them."""

    def __init__(self, loader, at):
        self.loader, self.left = loader, at

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def ours():
    return digits_data().train


class Noisy(torch.utils.data.Dataset):
    """Images with noise from torch's global generator, as augmentation of users often is."""

    def __init__(self):
        self.images, self.labels = digits_data().train.images[:700], digits_data().train.labels[:700]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i] + 0.1 * torch.randn(1, 8, 8) + 0.1 * float(np.random.rand()), self.labels[i]


def plain():
    return DataLoader(Noisy(), 64, shuffle=True)


def own_generator():
    return DataLoader(Noisy(), 64, shuffle=True, generator=torch.Generator().manual_seed(3))


def stateful():
    data = digits_data().train
    return StatefulDataLoader(TensorDataset(data.images[:700], data.labels[:700]), 64, shuffle=True)


def run(loader, out, stop_at=None, resume=False, **changes):
    torch.manual_seed(7)  # a StatefulDataLoader draws the seed of its order when it is made
    np.random.seed(0)
    train = loader()
    train = StopAt(train, stop_at) if stop_at else train
    config = dataclasses.replace(SHORT, **changes)
    with stop_on_signals():
        return compress(
            digits_model(), train, digits_data().val, budget=0.6, config=config, out=out, resume=resume
        )


def same(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("regularised", [False, True], ids=["plain", "mixed and averaged"])
def test_our_loader_goes_on_at_any_batch_of_any_phase(tmp_path, regularised):
    changes = REGULARISED if regularised else {}
    whole = run(ours, tmp_path / "whole", **changes)
    steps = len(ours())
    # In the warm-up, on even and odd steps of the search, at the end of an epoch, while post-training.
    for at in (3, steps, steps + 4, 2 * steps + 9, 3 * steps, 3 * steps + 5, 5 * steps - 1):
        out = tmp_path / str(at)
        with pytest.raises(Stopped, match=rf"after {(at - 1) % steps + 1} of {steps} batches"):
            run(ours, out, stop_at=at, **changes)
        assert not (out / "model.safetensors").exists()
        assert same(run(ours, out, resume=True, **changes), whole), at


@pytest.mark.parametrize("loader", [plain, own_generator, stateful])
def test_loaders_of_users_go_on_too(tmp_path, loader):
    whole = run(loader, tmp_path / "whole")
    for at in (4, 11, 17):
        with pytest.raises(Stopped):
            run(loader, tmp_path / str(at), stop_at=at)
        assert same(run(loader, tmp_path / str(at), resume=True), whole), at


def test_checkpoints_between_epochs_change_nothing_and_are_taken_up(tmp_path):
    class Fail(RunLog):
        def step(self, step, **scalars):
            if self._phase == "search" and step == 20:
                raise KeyboardInterrupt
            super().step(step, **scalars)

    whole = run(ours, tmp_path / "whole")
    often = dataclasses.replace(SHORT, checkpoint_every=3)
    data = digits_data()
    with pytest.raises(KeyboardInterrupt):
        log = Fail(tmp_path / "often")
        compress(digits_model(), data.train, data.val, 0.6, config=often, out=tmp_path / "often", log=log)
    _, facts = load_run(tmp_path / "often" / "checkpoint.safetensors")
    assert (facts["phase"], facts["epoch"], facts["done"]) == ("search", 1, 18 - len(ours()))
    assert same(run(ours, tmp_path / "often", resume=True), whole)


def test_tensors_in_the_state_of_a_loader_are_kept(tmp_path):
    state = {"a": [1, {"b": torch.arange(3)}], "c": torch.tensor(2.0), "d": None}
    save_run(tmp_path / "x", {"model": {"w": torch.ones(2)}}, {"loader": state})
    tensors, facts = load_run(tmp_path / "x")
    assert tensors.keys() == {"model"} and torch.equal(facts["loader"]["a"][1]["b"], torch.arange(3))
    assert float(facts["loader"]["c"]) == 2.0 and facts["loader"]["d"] is None


def test_handlers_come_back_and_nothing_stays_asked():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert asked()
    assert not asked() and signal.getsignal(signal.SIGTERM) is before


def test_the_end_of_the_launcher_asks_a_run_to_end(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    with stop_on_signals():
        assert not asked()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert asked()
    assert not asked()


def pictures(folder):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = random.integers(100 * label, 100 * label + 60, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def options(data, out, search_epochs=3):
    phases = {"teacher": 1, "warmup": 1, "search": search_epochs, "post": 1}
    epochs = [word for name, many in phases.items() for word in (f"--{name}-epochs", str(many))]
    data = ["--data", str(data), "--model", "uvc_vit_digits", "--batch-size", "4"]
    workers = min(2, len(os.sched_getaffinity(0)))  # more than there are processors would be a warning
    return ["--out", str(out), *data, *epochs, "--workers", str(workers), "--threads", "1", "--quiet"]


def start(arguments):
    command = [sys.executable, "-c", "from uvc.cli import main; main()", "compress"]
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step_5(process, out):
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"search", "step": 5' in log.read_text()):
        time.sleep(0.02)


def same_files(*folders):
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_line_ends_with_0_says_how_to_go_on_and_does(tmp_path):
    data = pictures(tmp_path / "data")
    assert start(options(data, tmp_path / "whole")).wait() == 0
    process = start(options(data, tmp_path / "broken"))
    wait_for_step_5(process, tmp_path / "broken")
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster does: to the workers as well
    said = process.communicate()[1]
    assert process.returncode == 0, said
    found = re.search(r"stopped in search, .*; continue with: uvc compress --resume --out (\S+)", said)
    assert found and found[1] == str(tmp_path / "broken") and "Traceback" not in said
    assert start(["--resume", "--out", found[1], "--quiet"]).wait() == 0
    assert same_files(tmp_path / "whole", tmp_path / "broken")


def test_where_the_data_vanish_a_line_says_how_to_go_on_once_they_are_back(tmp_path):
    data, out = pictures(tmp_path / "data"), tmp_path / "out"
    assert start(options(data, tmp_path / "whole", search_epochs=20)).wait() == 0
    process = start(options(data, out, search_epochs=20))
    wait_for_step_5(process, out)
    data.rename(tmp_path / "elsewhere")
    said = process.communicate()[1]
    assert process.returncode == 2 and said.count("\n") == 1, said
    assert re.match(
        rf"uvc: data: the folder '{data}/(train|val)' is gone; put it back; continue with: ", said
    )
    assert said.endswith(f"uvc compress --resume --out {out}\n")
    (tmp_path / "elsewhere").rename(data)
    assert start([*options(data, out, search_epochs=20), "--resume", "auto"]).wait() == 0
    assert same_files(tmp_path / "whole", out)


@pytest.mark.skipif(not Path("/proc").exists(), reason="children are found in /proc")
def test_where_a_worker_dies_a_line_says_how_to_go_on(tmp_path):
    out = tmp_path / "out"
    process = start(options(pictures(tmp_path / "data"), out, search_epochs=500))
    wait_for_step_5(process, out)
    worker, *_ = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    said = process.communicate()[1]
    # Threads of multiprocessing may have more to say.
    lines = [line for line in said.splitlines() if line.startswith("uvc: ")]
    assert process.returncode == 2 and len(lines) == 1, said
    assert lines[0].startswith("uvc: a process that reads images has ended (DataLoader worker (pid")
    assert lines[0].endswith(f"; continue with: uvc compress --resume --out {out}")
    assert (out / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("said", ["(pid 7) is killed by signal: Killed. ", "(pid(s) 7) exited unexpectedly"])
def test_a_worker_s_death_is_one_line_whichever_way_torch_says_it(said, tmp_path, monkeypatch, capsys):
    def batches(_):
        raise RuntimeError(f"DataLoader worker {said}")
        yield

    monkeypatch.setattr(TensorLoader, "__iter__", batches)
    out = tmp_path / "out"
    assert cli.run(["compress", "--data", "digits", "--budget", "0.5", "--out", str(out), "--quiet"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "reads images" in line]
    ended = f"a process that reads images has ended (DataLoader worker {said.strip()})"
    assert lines == [f"uvc: {ended}; continue with: uvc compress --resume --out {out}"]
    uvc.save(uvc.compact(uvc.convert(digits_model())), out / "model")
    assert cli.run(["eval", str(out / "model"), "--data", "digits"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"uvc: {ended}"

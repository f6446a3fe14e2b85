"""The command line: one line per mistake, a run from options to files, resuming, and the other commands."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import generate_default_cfgs, register_model

import uvc
import uvc.latency_table
from uvc import cli
from uvc.constraints import reachable
from uvc.models import uvc_vit_digits
from uvc.training.checkpoint import load_run, save_run
from uvc.training.logger import RunLog

EXAMPLES = Path(__file__).parent.parent / "examples"
EPOCHS = {"teacher": 1, "warmup": 1, "search": 2, "post": 1}
SHORT = ["--model", "uvc_test_vit", "--batch-size", "216", "--quiet"]
SHORT += [word for name, count in EPOCHS.items() for word in (f"--{name}-epochs", str(count))]

default_cfgs = generate_default_cfgs({"uvc_test_vit": {"input_size": (1, 8, 8), "num_classes": 10}})


@register_model
def uvc_test_vit(pretrained=False, **options):
    """The ViT for digits, small enough for a run in a second."""
    return uvc_vit_digits(pretrained, **{"embed_dim": 24, "depth": 3, "num_heads": 2, **options})


def weights(path, **options):
    save_file(uvc_test_vit(**options).state_dict(), path)
    return path


def mistakes(tmp_path):
    """Options that are wrong, and what the line must name: the argument and the value."""
    torn = weights(tmp_path / "torn.safetensors")
    torn.write_bytes(torn.read_bytes()[:5000])
    other = weights(tmp_path / "other.safetensors", num_classes=7)
    lacking = tmp_path / "lacking.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 24)}, lacking)
    (tmp_path / "file").write_text("no folder")
    toml = tmp_path / "settings.toml"
    toml.write_text("training.ema_decay = 2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    return {
        "a budget of zero": (["--budget", "0"], "--budget", "0"),
        "a budget above one": (["--budget", "1.5"], "--budget", "1.5"),
        "a budget of nan": (["--budget", "nan"], "--budget", "nan"),
        "a budget that is no number": (["--budget", "half"], "--budget", "half"),
        "two budgets without metrics": (["--budget", "0.5,0.4"], "--budget", "0.5,0.4"),
        "a budget for an unknown metric": (["--budget", "macs=0.5,joules=0.4"], "metric", "joules"),
        "one of two budgets below the smallest reachable": (
            ["--budget", "macs=0.5,params=0.0001"],
            "budget",
            "params",
        ),
        "a budget below the smallest reachable": (["--budget", "0.0001"], "budget", "0.0001"),
        "features without a teacher": (
            ["--distill", "none", "--distill-features", "1"],
            "--distill-features",
            "no teacher",
        ),
        "tokens at too many blocks": (["--tokens", "4"], "--tokens", "4"),
        "tokens without a budget that counts them": (
            ["--tokens", "2", "--metric", "params"],
            "tokens",
            "params",
        ),
        "an unknown metric": (["--metric", "joules"], "--metric", "joules"),
        "a latency table that is not there": (
            ["--metric", "latency", "--latency-table", str(tmp_path / "none.json")],
            "latency table",
            "none.json",
        ),
        "a latency table without a budget in latency": (
            ["--latency-table", str(tmp_path / "file")],
            "--latency-table",
            "add metric latency",
        ),
        "one multiple instead of two": (["--round-to", "16"], "--round-to", "16"),
        "a multiple that does not divide the model": (["--round-to", "5,8"], "round_to", "5"),
        "an unknown model": (["--model", "deit_tiny_patch16_225"], "--model", "deit_tiny_patch16_224"),
        "an unsupported model": (["--model", "resnet10t"], "model", "ResNet"),
        "an unknown data set": (["--data", "no_such_data"], "data", "no_such_data"),
        "an unknown device": (["--device", "abacus"], "--device", "abacus"),
        "a device torch knows and we do not": (["--device", "mps"], "--device", "mps"),
        "an unknown recipe": (["--recipe", "cake"], "--recipe", "cake"),
        "a negative seed": (["--seed", "-1"], "--seed", "-1"),
        "a learning rate of nan": (["--lr", "nan"], "--lr", "nan"),
        "a teacher cut short": (["--teacher", str(torn)], "--teacher", str(torn)),
        "a teacher for other classes and no time to train it": (
            ["--teacher", str(other), "--teacher-epochs", "0"],
            "--teacher",
            "head.weight",
        ),
        "a teacher that lacks weights": (["--teacher", str(lacking)], "--teacher", "lacks"),
        "no such teacher": (["--teacher", str(tmp_path / "none")], "--teacher", "none"),
        "an output that is a file": (["--out", str(tmp_path / "file")], "--out", "file"),
        "an output below a file": (["--out", str(tmp_path / "file" / "x")], "--out", "file"),
        "an output that nobody can write": (["--out", "/proc/uvc"], "--out", "/proc/uvc"),
        "an output with other files": (["--out", str(tmp_path / "mine")], "--out", "mine"),
        "nothing to resume": (["--resume"], "--resume", "out"),
        "a model argument that the model does not take": (
            ["--model-arg", "colour=3"],
            "--model-arg",
            "colour",
        ),
        "the number of classes as a model argument": (
            ["--model-arg", "num_classes=3"],
            "--model-arg",
            "num_classes",
        ),
        "a setting out of range in a file": (
            ["--config", str(toml)],
            "settings.toml: training.ema_decay",
            "2; it must be in [0, 1)",
        ),
        "an unknown option": (["--bugdet", "0.5"], "--bugdet", "--budget"),
    }


NAMES = """\
a budget of zero; a budget above one; a budget of nan; a budget that is no number;
two budgets without metrics; a budget for an unknown metric;
one of two budgets below the smallest reachable; a budget below the smallest reachable;
features without a teacher; tokens at too many blocks; tokens without a budget that counts them;
an unknown metric;
a latency table that is not there; a latency table without a budget in latency;
one multiple instead of two; a multiple that does not divide the model; an unknown model;
an unsupported model;
an unknown data set; an unknown device; a device torch knows and we do not; an unknown recipe;
a negative seed; a learning rate of nan; a teacher cut short;
a teacher for other classes and no time to train it;
a teacher that lacks weights; no such teacher; an output that is a file; an output below a file;
an output that nobody can write; an output with other files; nothing to resume;
a model argument that the model does not take; the number of classes as a model argument;
a setting out of range in a file; an unknown option"""
NAMES = NAMES.replace("\n", " ").split("; ")


@pytest.mark.parametrize("name", NAMES)
def test_mistake_is_one_line_and_leaves_nothing_behind(name, tmp_path, capsys):
    cases = mistakes(tmp_path)
    assert list(cases) == NAMES
    arguments, argument, value = cases[name]
    before = sorted(tmp_path.rglob("*"))
    # A second --out overrides the first.
    assert cli.run(["compress", "--out", str(tmp_path / "out"), *SHORT, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("uvc: ")
    assert argument in shown.err and value in shown.err and "Traceback" not in shown.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_one_line(tmp_path, capsys):
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--device" in shown and "use cpu" in shown
    assert not (tmp_path / "out").exists()


def test_a_model_that_could_not_be_saved_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("uvc.io.serialization.CLASSES", {})
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--data", "digits"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "VisionTransformer" in shown
    assert not (tmp_path / "out").exists()


def test_what_can_be_reached_is_said_before_any_training(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("uvc.app.pipeline._make_teacher", stop)
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--model", "uvc_test_vit"]) == 130
    lines = capsys.readouterr().err.splitlines()
    smallest = reachable(uvc_test_vit())[0].skipped
    assert lines[0].startswith(f"reachable macs: {smallest:.4f} of the dense cost")
    assert lines[1].startswith("reachable params: ") and "interrupted" in lines[2]


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


def test_no_command_shows_help(capsys):
    assert cli.run([]) == 0
    assert "compress" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on digits, from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    assert cli.run(["compress", "--out", str(folder), "--seed", "3", *SHORT]) == 0
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_run_meets_the_budget_and_says_what_it_did(finished):
    figures = summary(finished)
    assert (figures["model"], figures["data"], figures["seed"]) == ("uvc_test_vit", "digits", 3)
    assert (figures["budget"], figures["metric"], figures["device"]) == (0.5, "macs", "cpu")
    assert figures["macs_ratio"] == figures["final_macs"] / figures["dense_macs"]
    assert 0.495 <= figures["macs_ratio"] <= 0.5
    dense = uvc.cost(uvc_test_vit())
    assert (figures["dense_macs"], figures["dense_params"]) == (dense.macs, dense.params)
    for name in ("teacher_top1", "before_post_top1", "final_top1"):
        assert 0 <= figures[name] <= 100
    # Warm-up, search and post-training: four epochs of 6 steps.
    assert figures["steps"] == 24 and figures["seconds"] > 0
    assert [entry["batch"] for entry in figures["latency"]] == [1, 64]


def test_two_budgets_are_both_met(tmp_path):
    both = {"macs": 0.5, "params": 0.4}
    assert cli.run(["compress", "--out", str(tmp_path), "--budget", "macs=0.5,params=0.4", *SHORT]) == 0
    figures = summary(tmp_path)
    assert figures["budget"] == both
    ratios = {name: figures[f"final_{name}"] / figures[f"dense_{name}"] for name in both}
    assert all(ratios[name] <= both[name] for name in both)
    # One of them is used up: a neuron of this model is 0.3% of its parameters.
    assert any(ratios[name] >= 0.99 * both[name] for name in both)


def test_a_run_in_bfloat16_meets_its_budget_with_weights_in_float32(finished, tmp_path):
    options = ["--teacher", str(finished / "teacher"), "--seed", "3", *SHORT]
    assert cli.run(["compress", "--out", str(tmp_path), *options, "--precision", "bfloat16"]) == 0
    assert 0.495 <= summary(tmp_path)["macs_ratio"] <= 0.5
    assert {p.dtype for p in uvc.load(tmp_path).parameters()} == {torch.float32}
    # The same run but for its products.
    losses = [
        json.loads(line)["loss"]
        for folder in (finished, tmp_path)
        for line in (folder / "log.jsonl").read_text().splitlines()
        if '"loss"' in line and '"warmup"' in line
    ]
    first, rounded = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert first != rounded and first == pytest.approx(rounded, rel=0.05)


def test_a_run_may_drop_tokens_and_counts_them(tmp_path):
    assert cli.run(["compress", "--out", str(tmp_path), *SHORT, "--tokens", "2", "--budget", "0.4"]) == 0
    figures, small = summary(tmp_path), uvc.load(tmp_path)
    tokens = [block.tokens for block in uvc.structure_of(small).blocks]
    assert tokens == [block.get("tokens") for block in figures["structure"]["blocks"]] and any(tokens)
    assert 0.396 <= figures["macs_ratio"] <= 0.4 and uvc.cost(small).macs == figures["final_macs"]


def test_a_latency_budget_is_measured_met_and_verified(tmp_path, monkeypatch, capsys):
    def clock(model, images, _):
        assert len(images) in (1, 4, 64)
        return 1e-3 * sum(p.numel() for p in model.parameters())

    monkeypatch.setattr(uvc.latency_table, "pass_ms", clock)
    options = ["--metric", "latency", "--budget", "0.6", *SHORT]
    batch = ["--latency-batch", "4", "--round-to", "3,8"]
    assert cli.run(["compress", "--out", str(tmp_path / "a"), *options, *batch]) == 0
    figures, table = (
        summary(tmp_path / "a"),
        uvc.latency_table.LatencyTable.load(tmp_path / "a" / "latency.json"),
    )
    check = figures["latency_budget"]
    assert (table.batch, check["batch"]) == (4, 4)
    assert 0.55 < check["predicted_ratio"] <= 0.6
    assert check["measured_ratio"] == pytest.approx(check["predicted_ratio"], rel=0.1)
    for block in figures["structure"]["blocks"]:
        assert not any(len(dims) % 3 for dims in block["qk_dims"] + block["v_dims"])
        assert len(block["neurons"]) % 8 == 0
    assert "0.6 of latency" in capsys.readouterr().out

    # A table from elsewhere is not measured again.
    monkeypatch.setattr("uvc.training.compress.measure", None)
    given = ["--latency-table", str(tmp_path / "a" / "latency.json")]
    assert cli.run(["compress", "--out", str(tmp_path / "b"), *options, *given]) == 0
    assert summary(tmp_path / "b")["latency_budget"]["predicted_ratio"] <= 0.6


def test_a_latency_table_is_made_for_later(tmp_path, capsys):
    options = ["--model", "uvc_test_vit", "--batch-size", "2", "--round-to", "6,16"]
    assert cli.run(["latency", str(tmp_path / "table.json"), *options]) == 0
    table = uvc.latency_table.LatencyTable.load(tmp_path / "table.json")
    table.check(uvc_test_vit())
    assert table.batch == 2 and not any(n % 16 for n in table.neurons)
    assert "smallest budget" in capsys.readouterr().out
    assert cli.run(["latency", str(tmp_path / "no" / "table.json"), *options]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_saved_model_loads_and_is_what_was_measured(finished):
    small, figures = uvc.load(finished), summary(finished)
    assert uvc.cost(small).macs == figures["final_macs"]
    assert sum(p.numel() for p in small.parameters()) == figures["final_params"]
    structure = uvc.Structure.from_json((finished / "structure.json").read_text())
    assert structure == uvc.structure_of(small)
    assert structure == uvc.Structure.from_json(json.dumps(figures["structure"]))


def test_run_leaves_logs_and_a_picture(finished):
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == {"teacher", "warmup", "search", "post-train"}
    assert [line["step"] for line in lines if "step" in line and line["phase"] == "post-train"][-1] == 5
    assert (finished / "structure.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())
    assert not list(finished.rglob("*.part"))


def test_eval_gives_the_accuracy_of_the_summary(finished, capsys):
    assert cli.run(["eval", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert f"top-1 {summary(finished)['final_top1']:.2f} %  of 500 images of digits" in shown
    assert f"MACs {summary(finished)['final_macs']:,}" in shown


def test_eval_of_a_truncated_model_is_one_line(finished, tmp_path, capsys):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    model = tmp_path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    assert cli.run(["eval", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "model.safetensors" in shown


def test_report_shows_the_table_and_draws_again(finished, capsys):
    (finished / "structure.png").unlink()
    assert cli.run(["report", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "compressed" in shown and str(finished / "structure.png") in shown
    assert (finished / "structure.png").exists()


def test_a_run_is_not_overwritten_but_shown_again_with_resume(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert cli.run(["compress", "--out", str(finished), *SHORT]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.run(["compress", "--out", str(finished), "--resume"]) == 0
    assert "compressed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resume_with_another_option_is_one_line(finished, capsys):
    assert cli.run(["compress", "--out", str(finished), "--resume", "--budget", "0.3"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--budget" in shown and "0.3" in shown


def test_run_interrupted_in_every_phase_ends_with_130_and_resumes_to_the_same_result(
    finished, tmp_path, capsys, monkeypatch
):
    out, note = tmp_path / "out", RunLog.note
    arguments = ["--seed", "3", *SHORT]
    for phase in ("teacher", "search", "post-train"):

        def interrupt(self, phase=phase, **fields):
            note(self, **fields)
            if self._phase == phase and "epoch" in fields:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "note", interrupt)
            assert cli.run(["compress", "--out", str(out), *arguments]) == 130
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1].startswith("uvc: interrupted") and f"--resume --out {out}" in shown[-1]
        assert not (out / "summary.json").exists()
        arguments = ["--resume", "--quiet"]
    assert cli.run(["compress", "--out", str(out), *arguments]) == 0
    whole, resumed = summary(finished), summary(out)
    for name in ("structure", "teacher_top1", "before_post_top1", "final_top1", "steps"):
        assert resumed[name] == whole[name]


def test_a_file_of_all_settings_gives_the_same_result_as_options_and_recipe(finished, tmp_path, capsys):
    assert cli.run(["compress", "--seed", "3", *SHORT, "--show-config"]) == 0
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    options = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.run(["compress", *options]) == 0
    same = ("model.safetensors", "config.json", "structure.json", "run.json")
    assert all((tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes() for name in same)


def test_a_run_interrupted_in_an_older_version_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    """Its run.json holds options of the command line, its checkpoint settings under their former names."""
    out, note = tmp_path / "out", RunLog.note

    def interrupt(self, **fields):
        note(self, **fields)
        if self._phase == "search" and fields.get("epoch") == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "note", interrupt)
        assert cli.run(["compress", "--out", str(out), "--seed", "3", *SHORT]) == 130
    names = ["budget", "metric", "device", "threads", "workers", "data_root", "lr", "skip", "grain", "tokens"]
    names += ["recipe", "teacher", "latency_table", "latency_batch", "precision", "distill"]
    given = {"data": "digits", "model": "uvc_test_vit", "seed": 3, "batch_size": 216}
    given |= {f"{name}_epochs": count for name, count in EPOCHS.items()}
    (out / "run.json").write_text(json.dumps({**dict.fromkeys(names), **given}))
    tensors, facts = load_run(out / "checkpoint.safetensors")
    facts["settings"]["solver"]["grain"] = facts["settings"]["solver"].pop("round_to")
    facts["settings"]["threads"] = None
    save_run(out / "checkpoint.safetensors", tensors, facts)
    assert cli.run(["compress", "--out", str(out), "--resume", "--quiet"]) == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_model_argument_reaches_the_model_and_its_images(tmp_path):
    options = ["--model-arg", "img_size=12", "--model-arg", "depth=2", "--model-arg", "drop_path_rate=0.1"]
    assert cli.run(["compress", "--out", str(tmp_path), *options, *SHORT]) == 0
    small = uvc.load(tmp_path)
    assert small.patch_embed.img_size == (12, 12) and len(small.blocks) == 2
    assert cli.run(["eval", str(tmp_path)]) == 0


def test_a_run_whose_disk_is_full_is_one_line_and_resumes(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("uvc.io.files.save_file", full)
        assert cli.run(["compress", "--out", str(out), "--seed", "3", *SHORT]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "checkpoint.safetensors cannot be written: No space left" in shown
    assert shown.endswith(f"continue with: uvc compress --resume --out {out}\n")
    assert cli.run(["compress", "--out", str(out), "--resume", "--quiet"]) == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_resume_from_a_truncated_checkpoint_is_one_line(finished, tmp_path, capsys):
    shutil.copy(finished / "run.json", tmp_path)
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    (tmp_path / "checkpoint.safetensors").write_bytes((finished / "model.safetensors").read_bytes()[:1000])
    assert cli.run(["compress", "--resume", "--out", str(tmp_path), "--quiet", "--threads", "1"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "checkpoint.safetensors" in shown


def test_teacher_weights_are_used_and_not_trained(finished, tmp_path):
    options = ["--teacher", str(finished / "teacher"), "--seed", "3", *SHORT]
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--budget", "0.3", *options]) == 0
    assert summary(tmp_path / "out")["teacher_top1"] == summary(finished)["teacher_top1"]
    assert summary(tmp_path / "out")["macs_ratio"] <= 0.3
    assert not (tmp_path / "out" / "teacher").exists()


def test_a_teacher_with_another_classifier_is_trained_from_its_weights(finished, tmp_path, capsys):
    torch.save({"model": uvc_test_vit(num_classes=7).state_dict()}, tmp_path / "w.pth")
    options = ["--teacher", str(tmp_path / "w.pth"), "--budget", "0.5", *SHORT]
    with pytest.warns(
        UserWarning, match=r"head\.weight, head\.bias stay as they were: the file has \[7, 24\]"
    ):
        assert cli.run(["compress", "--out", str(tmp_path / "out"), *options]) == 0
    phases = [json.loads(line)["phase"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert "teacher" in phases
    saved = uvc.load(tmp_path / "out" / "teacher")  # whole, for other runs
    assert saved.num_classes == 10


def test_a_teacher_of_classes_in_another_order_is_refused(finished, tmp_path, capsys):
    model = uvc.load(finished / "teacher")
    model.pretrained_cfg["label_names"] = tuple("9876543210")
    uvc.save(model, tmp_path / "teacher")
    options = ["--teacher", str(tmp_path / "teacher"), *SHORT]
    assert cli.run(["compress", "--out", str(tmp_path / "out"), *options]) == 2
    assert "class 0 is '0' there but '9' in the teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_doctor_tells_versions_and_backends(capsys):
    assert cli.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(
        text in shown for text in (torch.__version__.split("+")[0], "attention", "reference", "bfloat16")
    )


def test_drop_in_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "drop_in_layers.py"))
    shown = capsys.readouterr().out
    assert float(shown.split("outputs differ by ")[1]) < 1e-4


def test_compression_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compress_digits.py", "1"])
    monkeypatch.setattr(timm, "create_model", lambda _name: uvc_test_vit())
    runpy.run_path(str(EXAMPLES / "compress_digits.py"))
    assert "first test digits: [" in capsys.readouterr().out

"""Runs that were interrupted or meet a full disk: one line, and the same result once they are resumed."""

import json
import shutil

from cli_runs import EPOCHS, SHORT, summary

from uvc import cli
from uvc.training.checkpoint import load_run, save_run
from uvc.training.logger import RunLog


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

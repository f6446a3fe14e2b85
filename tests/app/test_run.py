"""Runs from the command line to files, and the commands that read them."""

import json

import pytest
import torch
from cli_runs import SHORT, summary, uvc_test_vit
from oracle import images

import uvc
import uvc.latency_table
from uvc import cli
from uvc.constraints import reachable
from uvc.costs import count_macs


def test_what_can_be_reached_is_said_before_any_training(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("uvc.app.pipeline._make_teacher", stop)
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--model", "uvc_test_vit"]) == 130
    lines = capsys.readouterr().err.splitlines()
    smallest = reachable(uvc_test_vit())[0].skipped
    assert lines[0].startswith(f"reachable macs: {smallest:.4f} of the dense cost")
    assert lines[1].startswith("reachable params: ") and "interrupted" in lines[2]


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
    # One of them is met to the last unit: a neuron of this model is 0.3% of its parameters.
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
    monkeypatch.setattr("uvc.training.plan.measure", None)
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
    assert count_macs(small, images(small, 1)) == figures["final_macs"]  # what runs is what is counted
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


def test_a_file_of_all_settings_gives_the_same_result_as_options_and_recipe(finished, tmp_path, capsys):
    assert cli.run(["compress", "--seed", "3", *SHORT, "--show-config"]) == 0
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    options = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.run(["compress", *options]) == 0
    same = ("model.safetensors", "config.json", "structure.json", "run.json")
    assert all((tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes() for name in same)


def test_a_model_argument_reaches_the_model_and_its_images(tmp_path):
    options = ["--model-arg", "img_size=12", "--model-arg", "depth=2", "--model-arg", "drop_path_rate=0.1"]
    assert cli.run(["compress", "--out", str(tmp_path), *options, *SHORT]) == 0
    small = uvc.load(tmp_path)
    assert small.patch_embed.img_size == (12, 12) and len(small.blocks) == 2
    assert cli.run(["eval", str(tmp_path)]) == 0


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

"""One RunConfig from command line, TOML file and recipe, in that order; and that of a run to be resumed."""

import json

import pytest
import torch
from PIL import Image

from uvc import cli
from uvc.app.options import read_model_args
from uvc.app.resolve import resolve, stored_run
from uvc.app.run_dir import check_out, open_out
from uvc.app.start import open_data
from uvc.config import Config, DataConfig, RunConfig
from uvc.recipes import RECIPES

# What `uvc compress --data digits --budget 0.5 --seed 0 --threads 1` wrote to run.json before there was a
# RunConfig: the options of the command line.
# fmt: off
OLD = {
    "data": "digits", "budget": 0.5, "seed": 0, "threads": 1, "model": None, "device": None,
    "batch_size": None, "data_root": None, "workers": None, "metric": None, "latency_table": None,
    "latency_batch": None, "grain": [2, 4], "recipe": None, "teacher": None, "teacher_epochs": None,
    "warmup_epochs": 0, "search_epochs": None, "post_epochs": None, "lr": None, "precision": None,
    "skip": None, "tokens": None, "distill": None, "distill_features": None,
}
# fmt: on


def test_nothing_given_is_the_digits_recipe():
    run = resolve({})
    assert run == RunConfig(recipe="digits", training=RECIPES["digits"]())


def test_the_command_line_goes_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        """
        budget = 0.4
        lr = 0.01
        seed = 5
        model_args = { depth = 2, drop_path_rate = 0.1 }
        [training]
        search_epochs = 3
        [training.solver]
        tokens = 2
        """
    )
    run = resolve({"seed": 7, "tokens": None, "model_arg": {"depth": 3}}, file)
    assert (run.budget, run.seed, run.training.learning_rate, run.training.solver.tokens) == (0.4, 7, 0.01, 2)
    assert run.model_args == {"depth": 3, "drop_path_rate": 0.1}
    assert (run.training.search_epochs, run.training.post_epochs) == (3, RECIPES["digits"]().post_epochs)


def test_how_images_are_prepared_is_said_as_timms_script_says_it(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("reprob = 0.25\n[images]\ncolor_jitter = 0.1\n")
    options = "--show-config --scale 0.6 1 --mean 0.1 0.2 0.3 --crop-pct 0.9 --search-lr 0.02".split()
    assert cli.run(["compress", "--config", str(file), *options]) == 0
    file.write_text(capsys.readouterr().out)
    run = resolve({}, file)
    assert run.images == DataConfig(
        reprob=0.25, color_jitter=0.1, scale=(0.6, 1.0), mean=(0.1, 0.2, 0.3), crop_pct=0.9
    )
    assert run.training.search_learning_rate == 0.02


def test_images_are_prepared_as_a_run_says(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "white").save(tmp_path / part / name / "0.png")
    views = DataConfig(mean=(0.5,), std=(0.25,), color_jitter=0.0)
    run = RunConfig(data=str(tmp_path), images=views, training=Config(batch_size=2))
    for part in open_data(run, {"input_size": (3, 8, 8)})[:2]:
        ((images, _),) = part
        assert torch.allclose(images, torch.tensor(2.0))


@pytest.mark.parametrize("source", ["command line", "file"])
def test_a_zero_given_is_a_zero(source, tmp_path):
    zeros = {"teacher_epochs": 0, "warmup_epochs": 0, "workers": 0, "tokens": 0, "distill_features": 0}
    file = tmp_path / "run.toml"
    # A recipe has none of these zeros.
    file.write_text("".join(f"{name} = {0 if source == 'file' else 1}\n" for name in zeros))
    run = resolve(zeros if source == "command line" else {}, file)
    training = run.training
    assert (run.workers, training.teacher_epochs, training.warmup_epochs) == (0, 0, 0)
    assert (training.solver.tokens, training.distill.features) == (0, 0)


def test_show_config_can_be_fed_back(tmp_path, capsys):
    options = ["--budget", "macs=0.5,params=0.6", "--warmup-epochs", "0", "--round-to", "2,4", "--seed", "3"]
    options += ["--model-arg", "img_size=[16, 8]", "--model-arg", "global_pool=avg", "--distill", "hard"]
    assert cli.run(["compress", *options, "--show-config"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(shown)
    assert cli.run(["compress", "--config", str(tmp_path / "run.toml"), "--show-config"]) == 0
    assert capsys.readouterr().out == shown
    run = resolve({}, tmp_path / "run.toml")
    assert run.model_args == {"img_size": (16, 8), "global_pool": "avg"}
    assert run.training.solver.round_to == (2, 4) and run.training.warmup_epochs == 0


def test_the_former_spelling_of_an_option_works_and_is_not_shown(capsys):
    assert cli.run(["compress", "--grain", "2,4", "--show-config"]) == 0
    assert "round_to = [2, 4]" in capsys.readouterr().out
    assert cli.run(["compress", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--round-to" in shown and "--grain" not in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budget = 0.5 0.4", "--config: .*run.toml' cannot be read as TOML"),
        ("bugdet = 0.5", "bugdet: no such setting; known are out, resume, "),
        ("[training]\nwarmup_epochs = -1", "training.warmup_epochs: -1; it must be 0 or more"),
        ("training = 3", "training: 3; it must be a table of settings"),
        ("model = 3", "model: 3; it must be a text"),
        ("recipe = 'cake'", "recipe: 'cake' is unknown; use one of default, digits"),
        ("workers = '2'", "workers: '2'; it must be a whole number"),
        ("[model_args]\ndepth = { a = 1 }", "model_args.depth: {'a': 1}; it must be "),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_key(text, says, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        resolve({}, file)
    assert "run.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a='x y'", "x y"),
        ("a=avg", "avg"),
        ("a=[1, 2]", (1, 2)),
    ],
)
def test_a_model_argument_has_the_type_that_toml_gives_it(text, value, capsys):
    found = resolve({"model_arg": read_model_args(None, None, (text,))}).model_args["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["a", "=1", "a=None", "a=True", "a=1 2", "a b=1"])
def test_a_model_argument_that_is_none_is_refused(text, capsys):
    assert cli.run(["compress", "--model-arg", text]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and f"--model-arg: {text!r}; give NAME=VALUE" in shown


def test_files_and_folders_are_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    run = resolve({"teacher": "t", "data": "images", "model": "vit_tiny_patch16_224"})
    assert (run.teacher, run.data) == (str(tmp_path / "t"), str(tmp_path / "images"))


def test_what_a_run_began_with_comes_back(tmp_path):
    run = resolve({"out": str(tmp_path), "budget": 0.4, "round_to": [2, 4], "model_arg": {"depth": 2}})
    open_out(tmp_path, run)
    again = resolve({"out": str(tmp_path), "resume": True, "threads": 3, "workers": 2, "budget": 0.4})
    assert again.resume and (again.threads, again.workers) == (3, 2)
    assert (again.budget, again.training.solver, again.model_args) == (
        run.budget,
        run.training.solver,
        run.model_args,
    )
    for options in ({"budget": 0.3}, {"lr": 0.1}, {"model_arg": {"depth": 3}}, {"model_arg": {"x": 3}}):
        with pytest.raises(ValueError, match="but the run to resume began with"):
            resolve({"out": str(tmp_path), "resume": True, **options})


def test_a_run_of_an_older_version_is_understood(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(OLD))
    run = resolve({"out": str(tmp_path), "resume": True})
    assert (run.data, run.model, run.budget, run.training.warmup_epochs) == (
        "digits",
        "uvc_vit_digits",
        0.5,
        0,
    )
    assert run.training.solver.round_to == (2, 4)
    with pytest.raises(ValueError, match=r"^--round-to: \[4, 4\], but the run to resume began with \(2, 4\)"):
        resolve({"out": str(tmp_path), "resume": True, "round_to": [4, 4]})


@pytest.mark.parametrize("change", [{"training": {"seeds": 1}}, {"model": "vit_of_tomorrow", "colour": 1}])
def test_a_run_of_another_version_is_refused_in_one_line(change, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**OLD, **change}))
    with pytest.raises(ValueError, match="another version of uvc wrote it") as caught:
        stored_run(tmp_path)
    assert "run.json" in str(caught.value) and "\n" not in str(caught.value)


def test_resume_auto_begins_a_run_and_then_continues_it(tmp_path):
    options = {"out": str(tmp_path / "run"), "budget": 0.4, "resume": "auto"}
    first = resolve(options)
    assert not first.resume
    open_out(tmp_path / "run", first)
    again = resolve(options)
    assert again.resume and again.training == first.training and again.budget == 0.4
    with pytest.raises(ValueError, match="but the run to resume began with"):
        resolve(options | {"budget": 0.3})


def test_what_a_killed_process_left_of_a_file_does_not_keep_a_run_from_beginning(tmp_path):
    (tmp_path / ".run.json.77.part").write_text("{")
    check_out(tmp_path, resume=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        check_out(tmp_path, resume=False)


def test_resume_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="--resume: no --out is given"):
        resolve({"resume": True})
    with pytest.raises(ValueError, match="--resume: no --out is given"):
        resolve({"resume": "auto"})

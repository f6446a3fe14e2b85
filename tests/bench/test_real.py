"""The bench on a real model: what it is made from, its split, its rows, and its page."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.real import __main__ as command
from bench.real import arms, harness, packages, page, pictures, weights
from bench.real.setup import CONFIG, Setup
from bench.real.teacher import teacher


def picture(seed, alpha=255):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (16, 16, 4), generator=generator, dtype=torch.uint8)
    pixels[..., 3] = alpha
    return Image.fromarray(pixels.numpy())


def vendor_package(file, vendor, emojis):
    """A package like the vendors': emojis maps a name to (category, picture)."""
    facts = [
        {"image": f"{name}.png", "category": category, f"has_img_{vendor}": True}
        for name, (category, _) in emojis.items()
    ]
    files = {"package/emoji.json": json.dumps(facts).encode()}
    for name, (_, image) in emojis.items():
        png = io.BytesIO()
        image.save(png, "PNG")
        files[f"package/img/{vendor}/64/{name}.png"] = png.getvalue()
    with tarfile.open(file, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def emojis(tmp_path):
    """Two vendors' packages: two categories of 16 emoji, a3 and a7 alike at one of them; a skin tone."""
    files = {}
    for number, vendor in enumerate(("google", "twitter")):
        found = {
            f"{letter}{i}": (category, picture(1000 * number + 100 * j + i))
            for j, (letter, category) in enumerate((("a", "Food & Drink"), ("b", "Flags")))
            for i in range(16)
        }
        found["tone"] = ("Component", picture(7))
        if vendor == "twitter":
            found["a7"] = found["a3"]
        files[vendor] = tmp_path / f"{vendor}.tgz"
        vendor_package(files[vendor], vendor, found)
    return files


def test_what_is_transparent_shows_white():
    png = io.BytesIO()
    picture(0, alpha=0).save(png, "PNG")
    assert pictures.on_white(png.getvalue()).getcolors() == [(256, (255, 255, 255))]


def test_a_quarter_is_held_out_by_emoji_and_no_picture_is_on_both_sides(emojis, tmp_path):
    read = pictures.read(emojis)
    assert {category: len(found) for category, found in read.items()} == {"food-drink": 16, "flags": 16}
    pictures.write(read, tmp_path / "emoji", tmp_path / "tune")
    assert pictures.count(tmp_path / "emoji") == (48, 16)
    assert sum(pictures.count(tmp_path / "tune")) == 48
    for folder in ("emoji", "tune"):
        names, bytes_ = [], []
        for part in ("train", "val"):
            files = list((tmp_path / folder / part).glob("*/*.png"))
            names.append({file.stem.split("_")[0] for file in files})
            bytes_.append({file.read_bytes() for file in files})
        assert not names[0] & names[1] and not bytes_[0] & bytes_[1]
    held_out = {file.name for file in (tmp_path / "emoji" / "val").glob("*/*.png")}
    assert not held_out & {file.name for file in (tmp_path / "tune").glob("*/*/*.png")}


def test_emoji_that_look_alike_stay_together(emojis):
    assert ["a3", "a7"] in pictures.groups(pictures.read(emojis)["food-drink"])


def test_weights_come_out_of_onnx_under_the_names_of_timm():
    onnx = pytest.importorskip("onnx")
    width, hidden = 6, 12
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    layer = "backbone.encoder.layer.0."
    named = {
        "backbone.embeddings.cls_token": drawn(1, 1, width),
        "backbone.embeddings.patch_embeddings.projection.weight": drawn(width, 3, 2, 2),
        "backbone.embeddings.patch_embeddings.projection.bias": drawn(width),
        "backbone.layernorm.weight": drawn(width),
        "backbone.layernorm.bias": drawn(width),
        "onnx::Reshape_1": drawn(1, 9, width),
        "onnx::Concat_2": drawn(1, 1, width),
        "decoder.final_conv.bias": drawn(1),
    }
    for part in ("query", "key", "value"):
        named[f"{layer}attention.attention.{part}.bias"] = drawn(width)
    named[f"{layer}attention.output.dense.bias"] = drawn(width)
    for i in (1, 2):
        named[f"{layer}layer_scale{i}.lambda1"] = drawn(width)
        named |= {f"{layer}norm{i}.weight": drawn(width), f"{layer}norm{i}.bias": drawn(width)}
    named |= {f"{layer}mlp.fc1.bias": drawn(hidden), f"{layer}mlp.fc2.bias": drawn(width)}
    linear = {
        **{f"attention/attention/{part}": (width, width) for part in ("query", "key", "value")},
        "attention/output/dense": (width, width),
        "mlp/fc1": (width, hidden),
        "mlp/fc2": (hidden, width),
    }
    nodes = []
    for i, (path, shape) in enumerate(linear.items()):
        named[f"onnx::MatMul_{10 + i}"] = drawn(*shape)
        names = [f"x{i}", f"onnx::MatMul_{10 + i}"]
        nodes.append(
            onnx.helper.make_node("MatMul", names, [f"y{i}"], name=f"/backbone/encoder/layer.0/{path}/MatMul")
        )
    tensors = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in named.items()]
    found = weights.timm_weights(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors)))
    shape = dict(
        img_size=6, patch_size=2, embed_dim=width, depth=1, num_heads=2, mlp_ratio=2, init_values=1.0
    )
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **shape)
    model.load_state_dict(found)
    block = model.blocks[0]
    assert torch.equal(block.attn.qkv.weight[width : 2 * width], named["onnx::MatMul_11"].T)
    assert torch.equal(block.mlp.fc2.weight, named["onnx::MatMul_15"].T)
    assert torch.equal(block.ls2.gamma, named[f"{layer}layer_scale2.lambda1"])
    assert torch.equal(model.pos_embed[0, 1:], named["onnx::Reshape_1"][0])
    assert torch.equal(model.pos_embed[0, 0], named["onnx::Concat_2"][0, 0])


def test_another_file_under_the_name_of_a_package_is_refused(tmp_path):
    package = packages.Package("some.tgz", "0" * 64, ("false",))
    (tmp_path / "some.tgz").write_bytes(b"other")
    with pytest.raises(RuntimeError, match=r"some\.tgz.* has checksum .* remove it"):
        packages.fetch(tmp_path, [package])


def test_a_package_that_does_not_come_is_one_line(tmp_path):
    with pytest.raises(RuntimeError, match="failed: no file came"):
        packages.fetch(tmp_path, [packages.Package("some.tgz", "", ("true", "name"))])
    with pytest.raises(RuntimeError, match="no-such-program is not installed"):
        packages.fetch(tmp_path, [packages.Package("some.tgz", "", ("no-such-program", "name"))])


@pytest.fixture
def setup(emojis, tmp_path):
    """A tiny net on the tiny pictures: seconds for a row."""
    pictures.write(pictures.read(emojis), tmp_path / "emoji", tmp_path / "tune")
    config = replace(CONFIG, teacher_epochs=1, search_epochs=2, post_epochs=1, batch_size=16)
    tiny = Setup(tmp_path, config=config, model="test_vit", size=32)
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tiny.weights)
    threads = torch.get_num_threads()
    yield tiny
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_ends_within_the_budget_with_a_whole_row(setup, arm, tmp_path):
    if arm == "tp_isomorphic":
        pytest.importorskip("torch_pruning")
    (job,) = harness.jobs(setup, [arm], [0.6], [3])
    row = harness.run_job(setup, job)
    assert list(row) == harness.FIELDS and not any(value == "" for value in row.values())
    assert row["macs_ratio"] <= job.budget
    assert row["search_epochs"] + row["post_epochs"] == 3
    assert (row["train_images"], row["val_images"], row["seed"]) == (48, 16, 3)
    assert row["cpu_seconds"] > 0


def test_at_equal_compute_a_rival_trains_until_it_has_cost_what_uvc_cost(setup, tmp_path, capsys):
    file = tmp_path / "results.csv"
    wanted = harness.jobs(setup, ["uvc", "global_taylor"], [0.6], [0], "compute")
    assert [(job.arm, job.mode) for job in wanted] == [("global_taylor", "compute")]
    assert harness.run(setup, wanted, 1.0, file) == 1
    assert "row is missing; run --arms uvc first" in capsys.readouterr().out
    harness.run(setup, harness.jobs(setup, ["uvc", "global_taylor"], [0.6], [0]), 1.0, file)
    assert harness.run(setup, wanted, 1.0, file) == 0
    ours, equal_epochs, equal_compute = (
        {name: float(row[name]) for name in ("train_compute", "macs_ratio", "post_epochs")}
        for row in harness.read(file)
    )
    # Two epochs of search at no more than the dense cost, one after it, three of answers.
    assert 3 * ours["macs_ratio"] + 1 < ours["train_compute"] <= 2 + ours["macs_ratio"] + 1
    # One epoch of scores with the teacher's answers, then three.
    expected = 4 / 3 + 3 * (equal_epochs["macs_ratio"] + 1 / 3)
    assert equal_epochs["train_compute"] == pytest.approx(expected, abs=1e-3)
    more = equal_compute["train_compute"] - ours["train_compute"]
    assert 0 <= more < equal_compute["macs_ratio"] + 1 / 3


def test_a_search_costs_what_its_log_says(tmp_path):
    lines = [
        {"phase": "teacher", "step": 0, "loss": 1.0},
        {"phase": "search", "step": 0, "hard_cost": 1.0},
        {"phase": "search", "step": 5, "hard_cost": 0.5},
        {"phase": "search", "top1": 50.0},
        {"phase": "post-train", "step": 0, "loss": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert arms.cost_of_search(tmp_path / "log.jsonl") == 0.75


def test_uvc_and_its_rivals_share_the_teacher(setup):
    first, second = (
        harness.run_job(setup, job) for job in harness.jobs(setup, ["uvc", "global_taylor"], [0.6], [0])
    )
    assert first["teacher_top1"] == second["teacher_top1"] == round(teacher(setup, 0)[1]["top1"], 5)


def test_each_budget_has_seconds_of_its_own(setup, monkeypatch):
    monkeypatch.setattr(arms, "run_to_end", lambda program: "stopped at once")
    for budget in (0.6, 0.65):
        with pytest.raises(RuntimeError, match="stopped at once"):
            arms.uvc(setup, 0, budget)
    assert len(list((setup.folder / "runs").glob("*.seconds"))) == 2


def test_a_command_that_was_stopped_is_resumed(setup, monkeypatch):
    ran, real = [], arms.run_to_end
    monkeypatch.setattr(arms, "run_to_end", lambda program: ran.append(program) or real(program))
    first = arms.uvc(setup, 0, 0.6)
    (out,) = (run for run in (setup.folder / "runs").iterdir() if run.is_dir())
    (out / "summary.json").unlink()
    again = arms.uvc(setup, 0, 0.6)
    assert "--resume" not in ran[0] and "--resume" in ran[1]
    assert again["after_top1"] == first["after_top1"] and again["seconds"] > first["seconds"]


def test_the_most_telling_rows_come_first(tmp_path):
    order = harness.jobs(Setup(tmp_path), arms.ARMS, [0.5, 0.33], [1, 0])
    assert [(j.arm, j.budget) for j in order[:4]] == [
        ("uvc", 0.33),
        ("global_taylor", 0.33),
        ("uvc", 0.5),
        ("global_taylor", 0.5),
    ]
    assert [j.seed for j in order] == [0] * 8 + [1] * 8 + [0, 1]
    assert [j.arm for j in order[-2:]] == ["dense_extra"] * 2


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    ran = []

    def row(setup, job, compute):
        ran.append(job)
        return dict.fromkeys(harness.FIELDS, 0) | job._asdict() | {"version": harness.VERSION}

    monkeypatch.setattr(harness, "run_job", row)
    setup, file = Setup(tmp_path), tmp_path / "results.csv"
    wanted = harness.jobs(setup, ["uvc", "global_taylor"], [0.5], [0, 1])
    assert harness.run(setup, wanted[:1], 1.0, file) == 0
    assert harness.run(setup, wanted, 0.0, file) == 3
    assert harness.run(setup, wanted, 1.0, file) == 0 and ran == wanted
    assert len(file.read_text().splitlines()) == 5


def test_the_pages_are_those_of_the_rows():
    root = Path(__file__).parents[2]
    assert "<!-- real results -->" in (root / "docs/real.md").read_text()
    for name in ("docs/real.md", "README.md"):
        text = (root / name).read_text()
        assert page.filled(text, harness.read()) == text, "run: python -m bench.real page"


def test_the_page_says_what_is_missing_and_pairs_by_seed():
    def row(arm, seed, after):
        job = harness.Job("emoji", seed, 0.5, arm, "epochs", CONFIG.learning_rate)
        facts = {name: str(value) for name, value in job._asdict().items()}
        return dict.fromkeys(harness.FIELDS, "1") | facts | {"after_top1": after}

    rows = [row("uvc", 0, "80"), row("uvc", 1, "70"), row("global_taylor", 1, "71")]
    texts = page.blocks(rows)
    assert "| 0.5 | global Taylor, once | 1 | 1.0 | 71.0 (71.0) | -1.0 |" in texts["results"]
    assert "75.0 (80.0, 70.0)" in texts["results"]
    assert "global_taylor at 0.5 of seed 0, equal epochs" in texts["stand"]
    assert "global_taylor at 0.5 of seed 1, equal compute" in texts["stand"]
    assert "uvc at 0.5 of seed 0" not in texts["stand"]
    assert "| 0.5 | 1.0, 1.0 | 80.0, 70.0 | 71.0 |" in texts["short"]


def test_the_command_line_hands_every_option_to_its_field(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(harness, "run", lambda setup, *rest: given.append(setup) or 0)
    options = ["--part", "tune", "--lr", "3e-4", "--teacher-lr", "2e-4"]
    monkeypatch.setattr("sys.argv", ["bench.real", "run", str(tmp_path), *options])
    command.main()
    (setup,) = given
    assert (setup.folder, setup.part, setup.teacher_rate) == (tmp_path, "tune", 2e-4)
    assert setup.config.learning_rate == 3e-4 and setup.views == Setup(tmp_path).views

"""`uvc data DIR` finds what would spoil a run and exits with 1 then, with 0 otherwise."""

import shutil

import numpy as np
import pytest
from PIL import Image

from uvc.cli import run


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (8, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def told(folder, capsys):
    code = run(["data", str(folder)])
    return code, capsys.readouterr().out


def test_a_clean_folder_is_a_table_and_code_0(folder, capsys):
    code, out = told(folder, capsys)
    assert code == 0 and "problem" not in out and "note" not in out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["train", "10", "2", "5 cat", "5 dog", "8 to 12", "RGB"],
        ["val", "6", "2", "3 cat", "3 dog", "8 to 12", "RGB"],
    ]


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


PROBLEMS = {
    "an unreadable image": (
        lambda f: cut(f / "train/dog/1.png"),
        "train: 1 of 10 images cannot be read, first",
    ),
    "the same bytes in both splits": (
        lambda f: shutil.copy(f / "train/cat/2.png", f / "val/cat/9.png"),
        "1 images are in train and in val, byte for byte, first",
    ),
    "the same bytes in two classes": (
        lambda f: shutil.copy(f / "train/cat/2.png", f / "train/dog/9.png"),
        "1 images are in more than one class, byte for byte, first",
    ),
    "an empty class": (
        lambda f: [path.unlink() for path in (f / "val/dog").iterdir()],
        "holds no images; fill or remove it",
    ),
    "classes that differ": (lambda f: (f / "val/dog").rename(f / "val/cow"), "'cow' is only in val/"),
    "one class": (
        lambda f: [shutil.rmtree(f / split / "dog") for split in ("train", "val")],
        "there is one class",
    ),
    "no validation split": (lambda f: shutil.rmtree(f / "val"), "has no folder val or validation/"),
    "no splits": (lambda f: [shutil.rmtree(f / split) for split in ("train", "val")], "has no folder train/"),
    "floating-point pixels": (
        lambda f: Image.fromarray(np.zeros((8, 8), np.float32)).save(f / "val/cat/0.tif"),
        "val: 1 of 7 images cannot be read",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_named_and_gives_code_1(folder, capsys, name):
    spoil, says = PROBLEMS[name]
    spoil(folder)
    code, out = told(folder, capsys)
    lines = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1 and any(says in line for line in lines), out


def test_what_is_only_odd_is_a_note_and_code_0(folder, capsys):
    Image.fromarray(np.full((8, 8), 999, np.uint16)).save(folder / "train/cat/deep.png")
    Image.new("RGBA", (8, 8)).save(folder / "train/cat/alpha.png")
    frames = [Image.new("L", (8, 8), value) for value in (0, 99)]
    frames[0].save(folder / "val/dog/moving.gif", save_all=True, append_images=frames[1:])
    (folder / "val/dog/notes.txt").write_text("x")
    shutil.copy(folder / "val/dog/1.png", folder / "val/dog/again.png")
    code, out = told(folder, capsys)
    assert code == 0
    for says in (
        "train: 1 images have 16 bits per value, scaled to 8",
        "train: modes are 1 I;16, 10 RGB, 1 RGBA",
        "val: 1 images have more than one frame",
        "val: not used are 1 files ending in '.txt'",
        "1 files repeat another one of their split",
    ):
        assert f"note: {says}" in out


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path):
    assert run(["data", str(tmp_path / "nothing")]) == 2

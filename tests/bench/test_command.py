"""`uvc bench`: table, picture and CSV; regressions end with 1, mistakes with 2 and one line."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from uvc import cli
from uvc.bench.rows import read

ROOT = Path(__file__).parents[2]
SMALL = [
    "bench",
    "--model",
    "uvc_vit_digits",
    "--batch-size",
    "4",
    "--keep",
    "0.5",
    "--rounds",
    "3",
    "--threads",
    "1",
]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    before = torch.get_num_threads()
    assert cli.run([*SMALL, "--out", str(out)]) == 0
    torch.set_num_threads(before)
    (path,) = out.glob("*/quick.csv")
    return path


def test_it_leaves_rows_and_a_picture(measured):
    rows = read(measured)
    assert [(row.keep, row.variant) for row in rows] == [
        (1.0, "dense"), (1.0, "converted"), (0.5, "dense"), (0.5, "compacted"), (0.5, "on_the_fly"),
        (0.5, "solver"), (0.5, "solver_removing"),
    ]  # fmt: skip
    fly = rows[-3]
    assert fly.what == "training" and fly.threads == 1 and fly.batch == 4 and fly.rounds == 3
    assert fly.ms > 0 and fly.cap > 1.2 and fly.peak_mib > 0 and fly.error < 1e-4
    # Full-size weights and two averages of each stay on the fly; the compacted model's are smaller.
    assert fly.standing_mib == rows[0].standing_mib > 1.2 * rows[-4].standing_mib
    assert fly.speedup_compacted == pytest.approx(fly.speedup / rows[-4].speedup, rel=0.5)
    assert (measured.parent.parent / "bench.png").read_bytes().startswith(b"\x89PNG")


def rewritten(path, target, factor):
    """A saved CSV whose speed-ups are `factor` times those measured, with a narrow band."""
    lines = path.read_text().splitlines()
    names = lines[0].split(",")
    speedup, noise = names.index("speedup"), names.index("noise")
    out = [lines[0]]
    for line in lines[1:]:
        cells = line.split(",")
        cells[speedup], cells[noise] = str(factor * float(cells[speedup])), "0.02"
        out.append(",".join(cells))
    target.write_text("\n".join(out) + "\n")
    return target


def test_slower_than_a_saved_csv_ends_with_1(measured, tmp_path, capsys):
    faster = rewritten(measured, tmp_path / "faster.csv", 100)
    assert cli.run([*SMALL, "--out", str(tmp_path), "--against", str(faster)]) == 1
    assert "5 of 5 slower than the noise band allows" in capsys.readouterr().out


def test_not_slower_than_a_saved_csv_ends_with_0(measured, tmp_path, capsys):
    slower = rewritten(measured, tmp_path / "slower.csv", 0.01)
    assert cli.run([*SMALL, "--out", str(tmp_path), "--against", str(slower)]) == 0
    assert "no regression" in capsys.readouterr().out


@pytest.mark.skipif(
    shutil.which("git") is None
    or subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode != 0,
    reason="this is no git checkout",
)
def test_another_commit_is_measured_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Noise may well make this tree look slower in three rounds; that it was compared is what counts here.
    assert cli.run([*SMALL, "--against-ref", "HEAD"]) in (0, 1)
    printed = capsys.readouterr().out
    assert printed.count("x HEAD (") == 3 and "keep 0.5 on the fly" in printed
    assert not list(tmp_path.iterdir()), "a comparison of commits leaves nothing behind"


MISTAKES = {
    "an unknown model": (["--model", "deit_tiny_patch16_225"], "--model", "deit_tiny_patch16_224"),
    "a model that cannot be served": (["--model", "resnet10t"], "ResNet", "blocks"),
    "a kept fraction above one": (["--keep", "1.5"], "--keep", "1.5"),
    "a kept fraction of zero": (["--keep", "0.5,0"], "--keep", "0.5,0"),
    "a kept fraction that is no number": (["--keep", "half"], "--keep", "half"),
    "a device that is not here": (["--device", "abacus"], "--device", "abacus"),
    "float16 on the CPU": (["--dtype", "float16"], "--dtype", "float16"),
    "an unknown dtype": (["--dtype", "float8"], "--dtype", "float8"),
    "a batch of none": (["--batch-size", "0"], "--batch-size", "0"),
    "a CSV that is not there": (["--against", "nowhere.csv"], "nowhere.csv", "cannot read"),
    "a file that is no CSV of rows": (
        ["--against", str(ROOT / "pyproject.toml")],
        "pyproject.toml",
        "columns",
    ),
    "a commit that is not there": (["--against-ref", "no-such-ref"], "--against-ref", "no-such-ref"),
    "a commit like an option": (["--against-ref=--output=x"], "--against-ref", "--output=x"),
    "two things to compare with": (["--against", "x.csv", "--against-ref", "HEAD"], "--against", "exclude"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, tmp_path, capsys):
    options, *words = MISTAKES[name]
    assert cli.run(["bench", "--out", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert all(word in captured.err for word in words), captured.err
    assert not (tmp_path / "out").exists()

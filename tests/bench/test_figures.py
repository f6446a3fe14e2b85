"""Figures in the README and the docs are those of the CSV files."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from uvc.bench.ceilings import Ceilings
from uvc.bench.roofline import Pass, Work
from uvc.bench.rows import Group, append, make_rows
from uvc.bench.timing import Timing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def script(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plot():
    return script("plot")


@pytest.fixture
def results(tmp_path):
    """Rows of DeiT-T, in training 0.5 s dense and 0.25 s on the fly, in inference a third of that."""
    for what, scale in (("training", 1.0), ("inference", 1 / 3)):
        for keep in (0.5, 0.25):
            samples = {"dense": 500 * scale, "on_the_fly/auto": 500 * scale * keep, "masked": 510 * scale}
            group = Group(
                suite="models", model="deit_tiny_patch16_224", what=what, dtype=torch.float32, batch=8,
                keep=keep, device=torch.device("cpu"), threads=1,
                timings={variant: Timing((ms,) * 3, "wall") for variant, ms in samples.items()},
                works=dict.fromkeys(samples, Work((Pass(10**9, 0),))), backends={"on_the_fly/auto": "auto"},
            )  # fmt: skip
            append(tmp_path / "results", make_rows(group, Ceilings(100.0, ((1, 10.0),))))
    return tmp_path / "results"


def test_every_marked_table_is_what_the_csv_says(plot):
    text = (ROOT / "docs" / "bench.md").read_text()
    assert "<!-- bench training -->" in text
    assert plot.filled(text, plot.load(RESULTS)) == text, "run: python bench/plot.py"


def test_the_table_of_ratios_is_what_the_csv_says(tmp_path):
    ratios, page = script("ratios"), tmp_path / "bench.md"
    page.write_text((ROOT / "docs" / "bench.md").read_text())
    ratios.write_docs(page, next(RESULTS.rglob("ratios.csv")))
    assert page.read_text() == (ROOT / "docs" / "bench.md").read_text(), "run: python bench/ratios.py --docs"


def test_a_row_of_ratios_is_kept_and_the_latest_is_shown(tmp_path, monkeypatch):
    ratios, page, kept = script("ratios"), tmp_path / "page.md", tmp_path / "new" / "ratios.csv"
    page.write_text("before\n<!-- ratios -->\nold\n<!-- /ratios -->\nafter\n")
    figures = (
        {"dense_ms": 100.0, "rounds": 5}
        | {n: 0.5 for n in ratios.NAMES}
        | {f"{n} ±": 0.02 for n in ratios.NAMES}
    )
    monkeypatch.setattr(ratios, "measure", lambda *_: figures)
    threads = torch.get_num_threads()
    for times, count in ((0.5, "17"), (0.25, "197"), (0.75, "17")):
        figures["fly / dense"] = times
        ratios.main(["--tokens", count, "--threads", "1", "--to", str(kept)])
    torch.set_num_threads(threads)
    ratios.write_docs(page, kept)
    before, _, *lines, after = page.read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| deit_tiny")]
    assert (before, after) == ("before", "after") and "keep 0.5:" in lines[0]
    assert [(row[1], row[6]) for row in rows] == [("17", "0.750 ±2%"), ("197", "0.250 ±2%")]


def test_the_speed_that_the_readme_begins_with_is_a_row(plot):
    case = ("models", "deit_tiny_patch16_224", "training", 0.5, "float32", 1)
    rows = [r for r in plot.load(RESULTS) if (r.suite, r.model, r.what, r.keep, r.dtype, r.threads) == case]
    speedup = {row.variant: row.speedup for row in reversed(rows)}
    fly, masked = speedup["on_the_fly"], speedup["masked"]
    assert f"({fly:.2f} times; {masked:.2f} times when" in (ROOT / "README.md").read_text()


def test_the_readmes_picture_is_drawn_from_the_rows(tmp_path):
    script("hero").main(["--docs", str(tmp_path)])
    assert (tmp_path / "hero.png").stat().st_size > 20_000 and (ROOT / "docs" / "hero.png").is_file()


def test_the_scale_page_is_what_the_csv_says():
    assert (ROOT / "docs" / "scale.md").read_text() == script("scale").page(RESULTS), "run: bench/scale.py"


def test_the_docs_have_a_picture_per_device(plot):
    for device in {row.device for row in plot.load(RESULTS) if row.suite == "models"}:
        assert (ROOT / "docs" / plot.picture(device)).is_file(), "run: python bench/plot.py"


def test_tables_pages_and_pictures_come_from_rows(plot, results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench training -->\nold\n<!-- /bench training -->\nafter\n")
    arguments = ["--results", str(results), "--docs", str(tmp_path), "--readme", str(readme)]
    assert plot.main([*arguments, "--check"]) == 1 and "old" in readme.read_text()
    assert plot.main(arguments) == 0 and plot.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| **skipped on the fly**, full-size weights stay | 250.0 | 2.00 | 2% |" in text
    assert [path.name.startswith("bench_") for path in tmp_path.glob("*.png")] == [True]


def test_every_block_has_its_table(plot, results):
    for suite, name, ours, other in (
        ("kernels", "gather forward", "kernel/cpu", "plain_torch"),
        ("kernels", "mlp forward", "on_the_fly/cpu", "dense"),
    ):
        timings = {"dense": 4.0, other: 4.0, ours: 3.0} if other != "plain_torch" else {other: 4.0, ours: 3.0}
        group = Group(
            suite=suite, model="deit_tiny", what=name, dtype=torch.float32, batch=8, keep=0.5,
            device=torch.device("cpu"), threads=1,
            timings={each: Timing((ms,) * 3, "wall") for each, ms in timings.items()},
            works=dict.fromkeys(timings, Work((Pass(10**6, 10**6),))), backends={ours: ours.split("/")[1]},
        )  # fmt: skip
        append(results, make_rows(group, Ceilings(100.0, ((1, 10.0),))))
    rows = plot.load(results)
    expected = {
        "training": "| masked by multiplication | 510.0 | 0.98 |",
        "models": "| DeiT-T | inference | 0.25 | 8 | float32 | 1 | 4.00 |",
        "layers": "| deit_tiny mlp forward | 8 | float32 | cpu | 3.00 | 1.33 |",
        "ops": "| deit_tiny | gather forward | 0.5 | float32 | cpu | 3.00 | 4.00 | 1.33 |",
    }
    assert set(expected) == set(plot.BLOCKS)
    for name, line in expected.items():
        assert plot.block(name, rows).count(line) == 1, name
        head, rule, *lines = [text for text in plot.block(name, rows).splitlines() if text.startswith("|")]
        assert {text.count("|") for text in (head, rule, *lines)} == {head.count("|")}


def test_a_figure_that_was_changed_by_hand_is_seen(plot, results):
    rows = plot.load(results)
    text = plot.filled("<!-- bench training -->\n<!-- /bench training -->", rows)
    assert plot.filled(text.replace("| 2.00 |", "| 2.10 |"), rows) == text != text.replace("2.00", "2.10")


def test_an_unknown_block_is_named(plot):
    with pytest.raises(ValueError, match="bench nothing"):
        plot.filled("<!-- bench nothing -->\n<!-- /bench nothing -->", [])


def test_the_scale_page_follows_its_formula(results):
    # A faster row of other threads is no row of these.
    for path in results.rglob("models.csv"):
        lines = path.read_text().splitlines()
        other = [
            line.replace(",float32,1,8,", ",float32,2,8,").replace("500,500,500", "5,5,5")
            for line in lines[1:]
        ]
        assert other != lines[1:]
        path.write_text("\n".join([*lines, *other]) + "\n")
    text = script("scale").page(results)
    # 500 ms for 8 images: 16 a second. On the fly takes half of that; the teacher a third.
    d, k, t = 1 / 16, 1 / 32, 1 / 48
    # Half of the cost by equal factors: 0.5 ** t, of which the mean over t in [0, 1] is 0.7213.
    s = 0.05 * d + 0.65 * (0.4427 * d + 0.5573 * k) + 0.3 * k
    spent = (5 * d + 25 * s + 120 * k) / 150
    hours = [1_281_167 * 300 / 3600 * each for each in (d, spent + t, spent)]
    expected = " / ".join(f"{value:,.0f}" for value in hours)
    line = next(line for line in text.splitlines() if line.startswith("| DeiT-T | 16 |"))
    assert line.startswith(f"| DeiT-T | 16 | 32 | {expected} |")
    assert "computed, not measured" in text


def test_two_runs_are_held_against_each_other(tmp_path, capsys):
    agree = script("agree")

    def run(fly):
        timings = {"dense": Timing((4.0,) * 3, "wall"), "on_the_fly/auto": Timing((fly,) * 3, "wall")}
        group = Group(
            suite="models", model="deit", what="training", dtype=torch.float32, batch=8, keep=0.5,
            device=torch.device("cpu"), timings=timings, works=dict.fromkeys(timings, Work((Pass(1, 1),))),
            backends={"on_the_fly/auto": "auto"},
        )  # fmt: skip
        return append(tmp_path, make_rows(group, Ceilings(100.0, ((1, 10.0),))))[0]

    path = run(2.0)
    with pytest.raises(SystemExit) as error:
        agree.main([str(path)])
    assert error.value.code == 2 and "no setting was measured twice" in capsys.readouterr().err
    assert agree.main([str(run(2.02))]) == 0
    assert "1 of 1 agree within the noise band (100.0%); half of the bands" in capsys.readouterr().out
    assert agree.main([str(run(1.5))]) == 1
    assert "differs deit training keep 0.5 on_the_fly/auto: 1.980 -> 2.667" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["agree", "plot", "scale", "gpu"])
def test_scripts_explain_themselves(name):
    run = subprocess.run([sys.executable, str(ROOT / "bench" / f"{name}.py"), "--help"], capture_output=True)
    assert run.returncode == 0 and b"python bench/" in run.stdout

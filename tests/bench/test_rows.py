"""Rows and their CSV: append-only, read back as written, refused in one line; the table; regressions."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from uvc import environment
from uvc.bench import regression, rows, table
from uvc.bench.ceilings import Ceilings
from uvc.bench.figure import speedup_figure
from uvc.bench.roofline import Pass, Work
from uvc.bench.rows import Group, append, latest, make_rows, read
from uvc.bench.timing import Timing

CEILINGS = Ceilings(100.0, ((1 << 20, 40.0), (1 << 28, 10.0)))


def work(flops):
    return Work((Pass(flops, 0),))


def measured(suite="models", keep=0.5, fly_ms=60.0, noise=0.0):
    samples = {"dense": 100.0, "compiled": 90.0, "on_the_fly/triton": fly_ms}
    timings = {
        name: Timing(tuple(ms * (1 + noise * i) for i in range(-2, 3)), "wall")
        for name, ms in samples.items()
    }
    works = {"dense": work(int(2e9)), "compiled": work(int(2e9)), "on_the_fly/triton": work(int(1e9))}
    group = Group(
        suite=suite, model="deit", what="training", dtype=torch.float32, batch=8, keep=keep,
        device=torch.device("cpu"), timings=timings, works=works,
        backends={"on_the_fly/triton": "triton"}, peaks={"dense": 12.0}, threads=3,
    )  # fmt: skip
    return make_rows(group, CEILINGS)


def test_a_row_says_how_far_from_the_cap_it_is():
    dense, compiled, fly = measured()
    assert (fly.variant, fly.backend, fly.threads) == ("on_the_fly", "triton", 3)
    assert fly.speedup == pytest.approx(100 / 60) and fly.speedup_best == pytest.approx(90 / 60)
    assert fly.cap == pytest.approx(2.0) and fly.cap_fraction == pytest.approx(0.75)
    # 1 GFLOP at 100 GFLOP/s takes 10 ms, and it took 60.
    assert fly.roofline == pytest.approx(10 / 60) and fly.gflop_per_s == pytest.approx(1 / 0.06)
    assert dense.speedup == 1 and dense.cap == 1 and compiled.cap_fraction == pytest.approx(1.0)
    assert fly.images_per_s == pytest.approx(8 / 0.06) and dense.peak_mib == 12 and math.isnan(fly.peak_mib)


def test_rows_are_appended_and_read_back(tmp_path):
    first, second = measured(), measured(fly_ms=50.0)
    (path,) = append(tmp_path, first)
    text = path.read_text()
    assert append(tmp_path, second) == [path]
    assert path.read_text().startswith(text), "what was there must stay as it is"
    found = read(path)
    assert [row.key for row in found] == [row.key for row in first + second]
    assert [row.ms for row in latest(found)] == [100.0, 90.0, 50.0]
    assert path.parent.name == environment.slug(first[0].device)


def test_each_suite_has_its_file(tmp_path):
    paths = append(tmp_path, measured() + measured(suite="quick"))
    assert [path.name for path in paths] == ["models.csv", "quick.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "lacks the columns"),
        ("", "lacks the columns"),
        (None, "cannot read"),
    ],
    ids=["another table", "an empty file", "no file"],
)
def test_what_is_no_csv_of_ours_is_one_line(tmp_path, text, message):
    path = tmp_path / "file.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_row_is_named_by_its_line(tmp_path):
    (path,) = append(tmp_path, measured())
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(",8,", ",eight,")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 3 of"):
        read(path)


def test_the_table_has_a_line_per_row_of_a_model_and_per_kernel_of_a_layer():
    models, layers = measured(), measured(suite="kernels")
    lines = table.lines(models + layers)
    assert sum("on_the_fly/triton  " in line for line in lines) == 1
    (kernel,) = [line for line in lines if "deit training, keep 0.5, triton" in line]
    # Of the layer's other variants only the compiled one; dense is what all is compared with.
    assert kernel.split()[-1] == "1.11"


def training_steps(keep=0.5):
    samples = {"dense": 100.0, "compacted": 50.0, "on_the_fly/auto": 52.0, "solver/auto": 1.0}
    samples["solver_removing/auto"] = 2.0
    group = Group(
        suite="quick", model="deit", what="training", dtype=torch.float32, batch=8, keep=keep,
        device=torch.device("cpu"), timings={name: Timing((ms,) * 3, "wall") for name, ms in samples.items()},
        works=dict.fromkeys(samples, work(int(1e9))), backends=dict.fromkeys(list(samples)[2:], "auto"),
        peaks={"dense": 100.0, "compacted": 80.0, "on_the_fly/auto": 60.0, "solver/auto": 0.0},
        standing={"dense": 20.0, "compacted": 10.0, "on_the_fly/auto": 20.0, "solver/auto": 20.0},
    )  # fmt: skip
    return make_rows(group, CEILINGS)


def test_steps_stand_beside_the_compacted_and_the_dense_one_in_time_and_memory():
    found = table.fractions(training_steps() + training_steps(0.25))
    assert [(f.row.keep, f.other.variant) for f in found] == [
        (0.5, "compacted"), (0.5, "dense"), (0.25, "compacted"), (0.25, "dense"),
    ]  # fmt: skip
    compacted, dense = found[:2]
    assert (compacted.time, dense.time) == pytest.approx((1.04, 0.52))
    assert (compacted.memory, dense.memory) == pytest.approx((0.75, 0.6))
    assert (compacted.memory_with_standing, dense.memory_with_standing) == pytest.approx((80 / 90, 80 / 120))
    assert compacted.noise == pytest.approx(dense.noise)


def test_the_solver_works_in_one_step_of_two():
    shares = {row.variant: share for row, share in table.solver_shares(training_steps())}
    assert shares == pytest.approx({"solver": 0.5 / 52.5, "solver_removing": 1 / 53})
    lines = table.lines(training_steps())
    assert any("keep 0.5  solver / search step" in line and "0.95%" in line for line in lines)
    assert not any("solver/auto" in line for line in lines)


def test_ops_are_compared_with_plain_torch():
    timings = {"plain_torch": Timing((4.0,) * 3, "wall"), "kernel/cpu": Timing((2.0,) * 3, "wall")}
    group = Group(
        suite="kernels", model="deit_tiny", what="gather forward", dtype=torch.float32, batch=0, keep=0.5,
        device=torch.device("cpu"), timings=timings, works=dict.fromkeys(timings, Work((Pass(0, 10**6),))),
        backends={"kernel/cpu": "cpu"}, images=False,
    )  # fmt: skip
    plain, kernel = make_rows(group, CEILINGS)
    assert plain.speedup == 1 and kernel.speedup == pytest.approx(2.0) and kernel.cap == 1
    (line,) = [line for line in table.lines([plain, kernel]) if "gather" in line]
    assert line.split()[:7] == ["tiny", "gather", "forward,", "keep", "0.5,", "cpu", "2.000"]


def test_where_no_kernel_was_built_the_reference_has_the_line():
    reference = [replace(row, backend="reference") for row in measured(suite="kernels")]
    assert any("deit training, keep 0.5, reference" in line for line in table.lines(reference))


def test_nothing_measured_is_said():
    assert table.lines([]) == ["nothing was measured"]


def test_the_picture_draws_every_way_and_the_cap(tmp_path):
    figure = speedup_figure(measured(keep=0.5) + measured(keep=0.25, fly_ms=40.0))
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert labels == {"cap", "skipped on the fly, triton", "dense, compiled"}
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_slower_beyond_the_band_is_a_regression_and_within_it_is_not():
    saved = measured()
    for fly_ms, slower in ((60.5, False), (70.0, True), (40.0, False)):
        found = regression.compare(measured(fly_ms=fly_ms), saved, Path("x.csv"))
        assert [c.slower for c in found if "on_the_fly" in c.name] == [slower]
    assert "SLOWER" in str(regression.compare(measured(fly_ms=70.0), saved, Path("x.csv"))[-1])


def test_a_band_as_wide_as_the_figure_still_tells_a_tenth_from_it():
    assert regression.Comparison("x", 1.0, 0.1, 1.5, "x dense").slower
    assert not regression.Comparison("x", 1.0, 0.5, 1.5, "x dense").slower


def test_a_wide_band_is_called_noisy():
    found = regression.compare(measured(fly_ms=70.0, noise=0.2), measured(noise=0.2), Path("x.csv"))
    # The drift of all variants together is no noise of their ratio.
    assert all(c.band < 0.03 for c in found)
    assert "noisy" in str(regression.Comparison("x", 1.0, 0.9, 0.5, "x dense"))


def test_nan_is_slower_and_agrees_with_nothing():
    comparison = regression.Comparison("x", 1.0, math.nan, 0.5, "x dense")
    assert comparison.slower and not comparison.agrees


def test_the_last_two_rows_of_a_setting_are_held_against_each_other():
    runs = [measured(fly_ms=90.0), measured(fly_ms=60.0), measured(keep=0.25), measured(fly_ms=60.5)]
    found = regression.agreement([row for run in runs for row in run])
    assert [(c.name, c.agrees) for c in found] == [
        ("deit training keep 0.5 compiled", True), ("deit training keep 0.5 on_the_fly/triton", True),
    ]  # fmt: skip
    (_, fly) = regression.agreement(runs[0] + runs[1])
    # Faster is no regression, but no agreement either.
    assert not fly.agrees and not fly.slower


def test_a_csv_of_other_settings_is_one_line():
    with pytest.raises(ValueError, match=r"x\.csv has no row of deit, training, float32, batch 8, 3 threads"):
        regression.compare(measured(keep=0.25), measured(keep=0.5), Path("x.csv"))


def test_the_commit_is_that_of_this_tree_or_unknown():
    assert environment.commit() == "unknown" or 7 <= len(environment.commit().rstrip("+")) <= 12


def test_a_slug_is_fit_for_a_folder():
    assert environment.slug("AMD EPYC(tm) 9R14  96-Core") == "amd-epyc-tm-9r14-96-core"


def test_missing_figures_are_empty_cells():
    assert rows._text(math.nan) == "" and rows._text(0.000012345678) == "1.2346e-05"

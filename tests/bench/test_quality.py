"""The rival bench: its tasks, its CSV, its order of running, and every arm on a tiny net."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from bench.quality import __main__ as command
from bench.quality import arms, context, elastic, harness, page, report
from bench.quality.context import write_acceptance
from bench.quality.tasks import TASKS, Batches, Split, Task
from uvc.config import Config, SolverConfig
from uvc.costs import cost
from uvc.structure import structure_of


def tiny():
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % 10
        images = 0.3 * torch.randn(count, 1, 4, 4, generator=generator)
        return Split(images + labels[:, None, None, None] / 5, labels)

    return split(128), split(32), split(40)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Seconds instead of hours: a 4x4 task, few epochs of two batches."""
    monkeypatch.setitem(harness.TASKS, "tiny", Task("tiny", 4, 2, tiny))
    monkeypatch.setattr("bench.quality.tasks.EPOCH_IMAGES", 128)
    monkeypatch.setattr(context, "CACHE", tmp_path / "cache")
    config = Config(
        teacher_epochs=2,
        warmup_epochs=0,
        search_epochs=4,
        post_epochs=2,
        batch_size=32,
        learning_rate=2e-3,
        solver=SolverConfig(tokens=1),
    )
    monkeypatch.setattr(context, "CONFIG", config)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def job(arm, budget=0.3, mode="epochs", seed=0):
    return harness.Job(seed, budget, "tiny", arm, mode)


@pytest.mark.parametrize("arm", [name for name in arms.ARMS if not name.startswith("tp_")])
def test_every_arm_ends_within_the_budget_with_a_whole_row(arm):
    budgeted = arms.ARMS[arm].budgeted
    row = harness.run_job(job(arm, 0.3 if budgeted else 1.0))
    assert list(row) == harness.FIELDS
    assert row["macs_ratio"] <= 0.3 or not budgeted
    assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert row["search_epochs"] + row["post_epochs"] == (8 if arms.ARMS[arm].scratch else 6)


@pytest.mark.parametrize("arm", ["tp_magnitude", "tp_taylor", "tp_isomorphic"])
def test_torch_pruning_ends_within_the_budget(arm):
    pytest.importorskip("torch_pruning")
    assert 0.1 < harness.run_job(job(arm, 0.4))["macs_ratio"] <= 0.4


def test_macs_count_attention_whether_or_not_it_is_fused():
    model = context.build(TASKS["digits"])
    assert context.macs_of(model) == cost(model).macs


def test_a_search_leaves_its_trace():
    trace = []
    harness.run_job(job("uvc"), trace)
    assert trace and set(harness.TRACE_FIELDS[3:-1]) <= set(trace[0])
    assert trace[0]["target"] > 0.9 and trace[-1]["target"] == pytest.approx(0.3)


@pytest.mark.parametrize("arm", ["uvc", "uvc_no_tokens"])
def test_off_points_and_what_is_left_make_the_whole(arm):
    row = harness.run_job(job(arm))
    off = sum(row[f"off_{name}"] for name in ("blocks", "heads", "dims", "neurons", "tokens"))
    assert (row["off_tokens"] > 0) == (arm == "uvc")
    assert off / 100 + row["macs_ratio"] == pytest.approx(1.0, abs=1e-3)


def test_equal_compute_gives_every_arm_the_same_bill():
    bills = [
        harness.run_job(job(arm, 0.5, "compute"))["train_compute"]
        for arm in ("uvc", "global_taylor", "drop_last_k")
    ]
    assert max(bills) - min(bills) < 0.6  # one epoch at half the cost, and rounding


def test_at_equal_compute_what_comes_before_post_training_is_short():
    short = context.Context(harness.TASKS["tiny"], 0, 0.5, frugal=True)
    arms.ARMS["global_taylor"].make(short)
    scored = short.meter.macs
    arms.ARMS["uvc"].make(short)
    epoch = harness.epoch_macs(short)
    assert scored == pytest.approx(epoch / 4, rel=0.01)
    assert 0.25 * epoch < short.meter.macs - scored < 1.05 * epoch


def test_a_family_that_is_left_out_stays_whole():
    budget = context.Context(harness.TASKS["tiny"], 0, 0.6)
    structure = structure_of(arms.only("qk", "v")(budget))
    assert all(len(block.neurons) in (0, 192) for block in structure.blocks if block.mlp)


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    file, ran = tmp_path / "results.csv", []

    def row(job, trace):
        ran.append(job)
        trace.append({"step": 5, "z": 0.5, "unknown": 1.0})
        return {name: 0 for name in harness.FIELDS} | job._asdict() | {"version": harness.VERSION}

    monkeypatch.setattr(harness, "run_job", row)
    wanted = harness.jobs(["uvc", "dense_extra"], [0.3, 0.1], [0, 1], ["tiny"], "epochs")
    assert harness.run(wanted[:2], 1.0, 1, file) == 0
    assert harness.run(wanted, 1.0, 1, file) == 0
    assert len(ran) == len(set(ran)) == len(wanted) == 6
    assert harness.run(wanted, 1.0, 1, file) == 0 and len(ran) == 6
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 6 and set(rows[0]) == set(harness.FIELDS)
    traces = list(csv.DictReader((tmp_path / harness.TRACES).open()))
    assert [(row["seed"], row["budget"], row["z"]) for row in traces] == [
        ("0", "0.1", "0.5"),
        ("0", "0.3", "0.5"),
    ]


def test_no_row_begins_when_the_time_is_up(tmp_path):
    wanted = harness.jobs(["uvc"], [0.3], [0], ["tiny"], "epochs")
    assert harness.run(wanted, 0.0, 1, tmp_path / "results.csv") == 1


def test_an_early_stop_leaves_pairs():
    wanted = harness.jobs(["uvc", "drop_last_k"], [0.5, 0.08], [1, 0], list(TASKS)[:2], "epochs")
    assert [(j.seed, j.budget) for j in wanted[::4]] == [(0, 0.08), (0, 0.5), (1, 0.08), (1, 0.5)]
    assert [j.arm for j in wanted[:4]] == ["uvc", "drop_last_k"] * 2


def test_the_interval_is_that_of_students_t():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_differences_are_paired_by_seed():
    rows = [
        dict(arm=a, seed=s, x=x)
        for a, s, x in (("uvc", 0, 3), ("uvc", 1, 5), ("other", 1, 1), ("other", 2, 9))
    ]
    assert report.paired(rows, "uvc", "other", "x") == [4.0]


def test_training_images_are_the_same_every_time_and_disjoint_in_an_epoch():
    one, two = (Batches(tiny()[0], 32, seed=3) for _ in range(2))
    rows = torch.cat([one.rows for _ in one])
    assert sorted(rows.tolist()) == list(range(128))
    assert torch.equal(rows, torch.cat([two.rows for _ in two]))


def test_the_teacher_answers_from_memory_for_training_batches_only():
    it = context.Context(harness.TASKS["tiny"], 0, 0.5)
    for images, _ in it.batches:
        remembered = it.teacher(images)
        assert torch.allclose(remembered, it.dense(images), atol=1e-5)
    assert torch.allclose(it.teacher(images + 1), it.dense(images + 1), atol=1e-6)


def test_the_rule_for_tasks_compares_with_a_small_net():
    found = context.accept(harness.TASKS["tiny"])
    assert found["small_macs_ratio"] <= 0.15
    assert found["accepted"] == (found["dense_top1"] >= max(85, found["small_top1"] + 5))


@pytest.mark.parametrize("path", ["docs/quality.md", "README.md"])
def test_the_page_is_what_the_csv_says(path):
    text = (Path(__file__).parents[2] / path).read_text()
    assert "<!-- quality " in text
    assert page.filled(text, harness.read()) == text, "run: python -m bench.quality page"


def rows_of(arm, budget, before, after, mode="epochs"):
    """A row for each of seeds 0, 1, ..."""
    common = dict(task="tiny", budget=str(budget), arm=arm, mode=mode, date="2026-11-22")
    common |= {name: "0" for name in harness.FIELDS if name not in (*common, "seed", "structure")}
    return [
        {
            **common,
            "seed": str(i),
            "before_top1": str(b),
            "after_top1": str(a),
            "structure": "4/3+2/1 5|- -|- 7 9",
        }
        for i, (b, a) in enumerate(zip(before, after, strict=True))
    ]


def test_the_verdict_compares_with_the_closest_rival_and_names_what_is_not_shown():
    rows = rows_of("uvc", 0.08, [50, 60, 55], [80, 82, 81]) + rows_of("uvc", 0.5, [90, 90], [92, 92])
    rows += rows_of("drop_last_k", 0.08, [10, 12, 9], [70, 71, 72]) + rows_of(
        "uvc_no_tokens", 0.08, [99], [99]
    )
    rows += rows_of("global_taylor", 0.08, [30, 29, 31], [81, 81, 80])
    rows += rows_of("global_taylor", 0.5, [95, 95], [92.6, 92.6])
    large, small = page.verdict(rows, "epochs")[2:]
    assert small.split("|")[3:8] == [" 3 ", " 55.00 ", " global taylor 30.00 ", " +25.00 ± 13.83 ", " ahead "]
    assert small.split("|")[8:12] == [" 81.00 ", " global taylor 80.67 ", " +0.33 ± 2.87 ", " **not shown** "]
    assert large.endswith("| -0.60 ± 0.00 | **missed** |")


@pytest.mark.parametrize(
    ("rival", "word"), [([78.9, 80, 81], "ahead"), ([78, 84, 81], "**level**"), ([82, 83, 84], "**behind**")]
)
def test_at_equal_compute_only_ahead_is_what_was_asked(rival, word):
    rows = rows_of("uvc", 0.5, [50, 60, 55], [80, 81, 82], "compute")
    rows += rows_of("global_taylor", 0.5, [30, 29, 31], rival, "compute")
    assert page.verdict(rows, "compute")[2].endswith(f"| {word} |")
    assert page.verdict(rows, "epochs")[2:] == []


def test_ablations_are_differences_from_uvc():
    rows = rows_of("uvc", 0.08, [50, 60], [80, 82]) + rows_of("uvc_no_skip", 0.08, [40, 40], [79, 80])
    assert page.ablations(rows)[2:] == ["| uvc no skip | +15.0, +1.50 ± 6.35 (2) |"]


def test_what_was_tried_and_not_kept_stays_in_the_ablations():
    rows = rows_of("uvc", 0.08, [50, 60], [80, 82]) + rows_of("uvc_cross_terms", 0.08, [49, 59], [81, 83])
    assert page.ablations(rows)[2:] == ["| uvc cross terms | +1.0, -1.00 ± 0.00 (2) |"]
    assert not arms.ARMS.keys() & set(arms.FORMER)


def test_one_cycle_is_compared_with_two_for_uvc_and_the_greedy_that_searches():
    greedy = "global_taylor_rescored"
    rows = rows_of("uvc", 0.08, [50, 60], [80, 82]) + rows_of("uvc_one_cycle", 0.08, [55, 65], [81, 83])
    rows += rows_of(greedy, 0.08, [20, 20], [70, 71])
    assert page.one_cycle(rows) == ["No row yet."]
    rows += rows_of(f"{greedy}_one_cycle", 0.08, [20, 20], [72, 73])
    assert page.one_cycle(rows)[2:] == ["| tiny | 0.08 | 2 | +1.00 ± 0.00 | +2.00 ± 0.00 |"]
    assert page.ablations(rows) == ["No row yet."]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_the_same_images_every_time_and_no_class_is_rare(name):
    task = TASKS[name]
    train, val, test = task.draw()
    again = task.draw()[1]
    assert torch.equal(val.images, again.images) and val.images.shape[1:] == (1, task.size, task.size)
    for split in (train, val, test):
        counts = torch.bincount(split.labels, minlength=task.classes)
        assert len(counts) == task.classes and counts.min() > 0.5 * counts.max()


def test_what_is_kept_is_read_from_the_column_structure():
    assert page.kept_of("4/3+2/1 5|- -|- 7 9| 0") == [(6, 4, 5), (0, 0, 0), (0, 0, 7), (0, 0, 0)]


def test_pictures_come_from_rows(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for path in (docs / "quality.md", tmp_path / "README.md"):
        path.write_text("<!-- quality stand -->\n<!-- /quality stand -->\n")
    rows = rows_of("uvc", 0.08, [50, 60], [80, 82]) + rows_of("dense_extra", 1.0, [90], [91])
    (tmp_path / harness.TRACES).write_text(
        ",".join(harness.TRACE_FIELDS) + "\n" + "tiny,0,0.08,5" + ",0.5" * 11 + ",1\n"
    )
    page.write(rows, tmp_path / "results.csv", docs)
    assert len(list(docs.glob("quality_*.png"))) == 3
    rows += rows_of("uvc", 0.08, [50, 60], [80, 82], "compute")
    page.write(rows, tmp_path / "results.csv", docs)
    for path in (docs / "quality.md", tmp_path / "README.md"):
        assert "3 rows at equal epochs" in path.read_text()
    assert len(list(docs.glob("quality_*.png"))) == 4


@pytest.mark.parametrize(
    "typed", ["elastic --arms uvc", "page --seeds 0", "report --workers 1", "accept --minutes 1"]
)
def test_an_option_that_a_command_does_not_read_is_refused(typed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.quality", *typed.split()])
    with pytest.raises(SystemExit):
        command.main()
    first, option, _ = typed.split()
    assert f"{first} takes no {option}" in capsys.readouterr().err


def test_several_budgets_lie_beside_the_results_that_are_named(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(elastic, "run", lambda *options: given.append(options))
    other = tmp_path / "new" / "other.csv"
    options = ["elastic", "--seeds", "3", "--tasks", "pairs", "--results", str(other)]
    monkeypatch.setattr("sys.argv", ["bench.quality", *options])
    command.main()
    assert given == [(["pairs"], [3], 300.0, other.with_name("elastic.csv"))]
    assert other.parent.is_dir()  # where rows go is known to be there before anything is trained


def test_a_task_found_hard_enough_leaves_the_others_findings(tmp_path):
    file = tmp_path / "tasks.json"
    write_acceptance([{"task": "a", "seed": 0, "accepted": True}, {"task": "b", "seed": 0}], file)
    write_acceptance([{"task": "a", "seed": 0, "accepted": False}], file)
    assert json.loads(file.read_text()) == [
        {"task": "a", "seed": 0, "accepted": False},
        {"task": "b", "seed": 0},
    ]


def test_several_budgets_in_one_model_leave_a_row_each(tmp_path):
    file = tmp_path / "elastic.csv"
    for _ in range(2):  # what is there is not run again
        elastic.run(["tiny"], [0], 1.0, file)
    rows = elastic.read(file)
    assert [float(row["budget"]) for row in rows] == list(elastic.BUDGETS) and set(rows[0]) == set(
        elastic.FIELDS
    )
    assert all(0.8 * float(row["budget"]) < float(row["macs_ratio"]) <= float(row["budget"]) for row in rows)
    # Each step after the search trains the smallest and one of the two others.
    larger, middle, smallest = (float(row["macs_ratio"]) for row in rows)
    epochs = elastic.POST_EPOCHS * (smallest + (larger + middle) / 2)
    assert epochs < float(rows[0]["train_compute"]) < epochs + 4
    assert len({row["train_compute"] for row in rows}) == 1 and elastic.stand(rows).startswith("Epochs")


def test_together_is_compared_with_alone_by_seed_and_in_compute():
    alone = [
        row | {"train_compute": "3.0"}
        for budget, top1 in ((0.5, [92, 91]), (0.33, [90, 90]))
        for row in rows_of("uvc", budget, [0, 0], top1)
    ]
    together = [
        {"task": "tiny", "seed": str(seed), "budget": str(budget), "after_top1": "90.5", "train_compute": "4"}
        for seed in (1, 0, 7)
        for budget in (0.5, 0.33)
    ]
    assert elastic.table(together, alone)[2:] == [
        "| tiny | 0.5 | 2 | 91.50 | 90.50 | -1.00 ± 6.35 | 3.00 |  |",
        "| tiny | 0.33 | 2 | 90.00 | 90.50 | +0.50 ± 0.00 | 3.00 |  |",
        "| tiny | all | 2 | 90.75 | 90.50 | -0.25 ± 3.18 | 6.00 | 4.00, 0.67 of it |",
    ]
    assert elastic.table([], alone) == ["No row yet."]

"""docs/real.md and the README's table from the CSV: no figure is typed by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench.quality.page import between_markers
from bench.quality.report import OURS, Row, line, mean_of, paired, read_rows, shown
from bench.real.arms import ARMS
from bench.real.harness import Job, jobs, key
from bench.real.setup import VERSION, Setup

BUDGETS, SEEDS, MODES = (0.5, 0.33), (0, 1), ("epochs", "compute")
NAMES = {
    "uvc": "**UVC**, `uvc compress`",
    "global_taylor": "global Taylor, once",
    "global_taylor_rescored": "global Taylor, re-scored",
    "tp_isomorphic": "torch-pruning, isomorphic",
    "dense_extra": "dense, trained on",
}

TRIED = Path(__file__).with_name("tried.csv")  # rows of what was tried after the search
TRIED_NAMES = {
    "uvc": "**as it is**",
    "uvc_kept_optimizer": "the same two cycles, the optimiser kept, no second warm-up of the rate",
    "uvc_one_cycle": "one cycle over the whole run, one optimiser",
    "uvc_one_cycle_fresh": "one cycle, a fresh optimiser after the search",
    "uvc_one_cycle_early": "one cycle, one optimiser, the budget reached at 0.35 of the search, not 0.7",
    "uvc_layer_decay": "as it is, rates of earlier blocks lower by 0.8 each in post-training",
    "uvc_averaged": "as it is, weights of post-training averaged (0.98)",
    "uvc_features": "as it is, outputs of all blocks drawn to the teacher's in half of post-training",
    "uvc_four_two": "as it is, but four epochs of search and two of post-training",
}


def of_part(rows: Iterable[Row], part: str = "emoji") -> list[Row]:
    """Rows of held-out pictures, or of those for choosing settings."""
    return [row for row in rows if row["part"] == part]


def results(rows: list[Row]) -> str:
    """A table: every arm at every budget, what it reached by seed, and what it took."""
    out = [
        "| MACs kept | | seeds | after the search | **after post-training** | UVC - it, by seed | MACs "
        "| parameters | compute | seconds | processor seconds |",
        "|---" * 11 + "|",
    ]
    cases = defaultdict(list)
    for row in rows:
        cases[float(row["budget"]), row["mode"], row["arm"]].append(row)
    for budget, mode, arm in sorted(
        cases, key=lambda case: (-case[0], MODES.index(case[1]), ARMS.index(case[2]))
    ):
        own = sorted(cases[budget, mode, arm], key=lambda row: int(row["seed"]))
        differences = (
            []
            if arm in (OURS, "dense_extra")
            else paired([*own, *cases[budget, "epochs", OURS]], OURS, arm, "after_top1")
        )
        more = f" for UVC's compute, {own[0]['post_epochs']} epochs" if mode == "compute" else ""
        cells = [
            f"{budget:g}",
            NAMES[arm] + more,
            ", ".join(row["seed"] for row in own),
            "" if arm == "dense_extra" else f"{mean_of(own, 'before_top1'):.1f}",
            f"{mean_of(own, 'after_top1'):.1f} ({', '.join(_short(row['after_top1']) for row in own)})",
            ", ".join(f"{difference:+.1f}" for difference in differences),
            f"{mean_of(own, 'macs_ratio'):.3f}",
            f"{mean_of(own, 'params_ratio'):.3f}",
            shown(own, "train_compute", ".2f"),
            f"{mean_of(own, 'seconds'):.0f}",
            f"{mean_of(own, 'cpu_seconds'):.0f}",
        ]
        out.append(line(cells))
    return "\n".join(out) if cases else "No row yet."


def teachers(rows: list[Row]) -> str:
    """Which teacher each seed had."""
    found = sorted({(int(r["seed"]), r["probe_top1"], r["teacher_top1"]) for r in rows})
    out = ["| seed | linear classifier on frozen features | fine-tuned: the teacher |", "|---|---|---|"]
    out += [f"| {seed} | {_short(probe)} | {_short(top1)} |" for seed, probe, top1 in found]
    return "\n".join(out) if found else "No row yet."


def short(rows: list[Row]) -> str:
    """The README's table: top-1 after post-training, by seed."""
    arms = [arm for arm in ARMS if arm != "dense_extra" and any(row["arm"] == arm for row in rows)]
    if not arms:
        return "No row yet."
    out = [
        "| MACs kept | teacher | " + " | ".join(NAMES[arm] for arm in arms) + " |",
        "|---" * (len(arms) + 2) + "|",
    ]
    for budget in BUDGETS:
        found = {arm: _by_seed(rows, arm, budget, "after_top1") for arm in arms}
        cells = [f"{budget:g}", _by_seed(rows, OURS, budget, "teacher_top1"), *found.values()]
        out.append(line(cells))
    return "\n".join(out)


def _by_seed(rows: list[Row], arm: str, budget: float, field: str) -> str:
    own = [r for r in rows if r["arm"] == arm and float(r["budget"]) == budget and r["mode"] == "epochs"]
    return ", ".join(_short(row[field]) for row in sorted(own, key=lambda row: int(row["seed"])))


def stand(rows: list[Row]) -> str:
    """How many rows there are, where they were run, and which are missing."""
    missing = [job for job in wanted() if job not in {key(row) for row in rows}]
    out = [f"{len(rows)} rows."]
    for device in sorted({row["device"] for row in rows}):
        own = [row for row in rows if row["device"] == device]
        days, commits, versions = (sorted({r[name] for r in own}) for name in ("date", "commit", "versions"))
        where = f"{len(own)} on {device}, {_between(days)}, commit {', '.join(commits)}"
        out.append(f"{where}, with {'; '.join(versions)}.")
    if missing:
        names = ", ".join(
            f"{job.arm} at {job.budget:g} of seed {job.seed}, equal {job.mode}" for job in missing
        )
        out.append(f"Still missing: {names}.")
    return " ".join(out)


def tried(rows: list[Row]) -> str:
    """What was tried where settings are chosen: top-1 after the search and after post-training."""
    out = ["| three epochs of search, three of post-training | 0.33 | 0.5 |", "|---|---|---|"]
    for arm, name in TRIED_NAMES.items():
        own = {float(row["budget"]): row for row in of_part(rows, "tune") if row["arm"] == arm}
        both = [
            f"{_short(r['before_top1'])}, {_short(r['after_top1'])}" if (r := own.get(b)) else ""
            for b in (0.33, 0.5)
        ]
        out.append(line([name, *both]))
    return "\n".join(out)


def held_out(rows: list[Row]) -> str:
    """Top-1 after post-training by seed: as it is, with one cycle, and with more of the epochs searched."""
    out = [
        "| held-out pictures, seeds 0, 1 | as it is | one cycle | four epochs and two |",
        "|---|---|---|---|",
    ]
    for budget in BUDGETS:
        for arm, name in (("uvc", "UVC"), ("global_taylor_rescored", "global Taylor, re-scored")):
            found = (
                _by_seed(rows, each, budget, "after_top1")
                for each in (arm, f"{arm}_one_cycle", f"{arm}_four_two")
            )
            out.append(line([f"{budget:g}, {name}", *found]))
    return "\n".join(out)


def tried_rows() -> list[Row]:
    """Those of `TRIED`, with what they have in common with rows of results. Arms that share their epochs in
    another way than four and two have three and three.
    """
    rows = read_rows(TRIED, VERSION)
    return [
        {**r, "mode": "epochs", "arm": "uvc_four_two" if r["search_epochs"] == "4" else r["arm"]}
        for r in rows
    ]


def setting(rows: list[Row]) -> str:
    """The setting that all rows have in common."""
    if not rows:
        return "No row yet."
    (one,) = {tuple(row[name] for name in SETTING) for row in rows}
    found = dict(zip(SETTING, one, strict=True))
    return (
        "{train_images} pictures to train, in random crops of {crop_scale} to 1 of their area, {val_images} "
        "held out; batches of {batch_size}, AdamW, peak learning rate {search_learning_rate} in the search, "
        "{learning_rate} after it (teacher {teacher_learning_rate}, {teacher_epochs} epochs), "
        "{precision}, {threads} thread."
    ).format(**found)


SETTING = (
    "train_images val_images batch_size learning_rate search_learning_rate teacher_learning_rate "
    "teacher_epochs crop_scale precision threads"
).split()


def wanted() -> list[Job]:
    """All rows of the page."""
    return [job for mode in MODES for job in jobs(Setup(Path()), ARMS, BUDGETS, SEEDS, mode)]


def blocks(rows: list[Row]) -> dict[str, str]:
    """The text of every block of the page."""
    rows, others = of_part(rows), tried_rows()
    writers = (results, teachers, short, stand, setting)
    texts = {writer.__name__: writer(rows) for writer in writers}
    return {**texts, "tried": tried(others), "held_out": held_out([*rows, *of_part(others)])}


def filled(text: str, rows: list[Row]) -> str:
    """`text` with every block of this bench between its markers written anew."""
    return between_markers(text, "real", blocks(rows))


def write(rows: list[Row], docs: Path) -> None:
    """The page, and the README above it."""
    for page in (docs / "real.md", docs.parent / "README.md"):
        page.write_text(filled(page.read_text(), rows))


def _short(percent: str) -> str:
    return f"{float(percent):.1f}"


def _between(days: list[str]) -> str:
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"

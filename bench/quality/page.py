"""docs/quality.md, its pictures, and the verdict in the README from the CSV files: nothing typed by hand."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from bench.quality import elastic
from bench.quality.arms import ARMS, FORMER, MAIN
from bench.quality.harness import TRACES, VERSION
from bench.quality.report import OURS, Row, interval, line, mean_of, paired, read_rows, render

RIVALS = [name for name in MAIN if name not in (OURS, "dense_extra")]
# Before post-training, UVC claims to lead at these budgets; after it, to win at SMALL and to tie elsewhere.
LEADS, SMALL, TIE = 0.33, 0.15, 0.5
ONE_CYCLE = "_one_cycle"
BELOW = 15.0  # points below dense that the picture after post-training shows
COLOURS = ("#b3412e", "#3b6fb6", "#3a8f6b", "#8a5fb0", "#9a9a96", "#d9822b")


def verdict(rows: list[Row], mode: str) -> list[str]:
    """UVC against the best main rival of each task and budget, and whether the stated goal is met.

    The best rival is the one of the smallest mean difference over the seeds that both have.
    """
    out = [
        "| task | budget | seeds | UVC before | best rival before | UVC - rival | | UVC after "
        "| best rival after | UVC - rival | |",
        "|---" * 11 + "|",
    ]
    for (task, budget), here in _cases(rows, mode):
        ours = [row for row in here if row["arm"] == OURS]
        if not ours:
            continue
        cells = [task, f"{budget:g}"]
        for field in ("before_top1", "after_top1"):
            found = _best(here, field)
            if found is None:
                break
            arm, difference = found
            mean, half = interval(difference)
            if field == "before_top1":
                cells.append(str(len(difference)))
            cells += [f"{mean_of(ours, field):.2f}", f"{_readable(arm)} {_at_seeds(here, arm, field):.2f}"]
            cells += [f"{mean:+.2f} ± {half:.2f}", _judged(field, budget, mean, half, mode)]
        else:
            out.append(line(cells))
    return out


def short(rows: list[Row], task: str = "digits") -> list[str]:
    """One line for each budget of one task: UVC, the best rival after post-training, their difference."""
    out = ["| MACs kept | UVC | best rival | UVC - rival, points |", "|---" * 4 + "|"]
    for (name, budget), here in _cases(rows, "epochs"):
        found = _best(here, "after_top1") if name == task else None
        if found:
            ours = mean_of([row for row in here if row["arm"] == OURS], "after_top1")
            theirs = f"{_at_seeds(here, found[0], 'after_top1'):.2f}, {_readable(found[0])}"
            out.append(
                "| {:g} | {:.2f} | {} | {:+.2f} ± {:.2f} |".format(budget, ours, theirs, *interval(found[1]))
            )
    return out


def _cases(rows: list[Row], mode: str) -> list[tuple[tuple[str, float], list[Row]]]:
    cases = defaultdict(list)
    for row in rows:
        if row["mode"] == mode and float(row["budget"]) < 1.0:
            cases[row["task"], float(row["budget"])].append(row)
    return sorted(cases.items(), key=lambda case: (case[0][0], -case[0][1]))


def _best(rows: list[Row], field: str) -> tuple[str, list[float]] | None:
    """The main rival that is closest to UVC or ahead of it, with the differences UVC - rival by seed."""
    found = [(arm, paired(rows, OURS, arm, field)) for arm in RIVALS]
    found = [(arm, differences) for arm, differences in found if len(differences) > 1]
    return min(found, key=lambda one: interval(one[1])[0], default=None)


def _at_seeds(rows: list[Row], arm: str, field: str) -> float:
    seeds = {row["seed"] for row in rows if row["arm"] == OURS}
    return mean_of([row for row in rows if row["arm"] == arm and row["seed"] in seeds], field)


def _judged(field: str, budget: float, mean: float, half: float, mode: str) -> str:
    """Whether what is asked holds: ahead by more than the interval, or not behind by more than TIE; and where
    the interval leaves zero out, on which side.
    """
    if field == "before_top1":
        return "" if budget > LEADS or mode == "compute" else ("ahead" if mean > half else "**not shown**")
    if mode == "compute":
        return "ahead" if mean > half else "**behind**" if mean < -half else "**level**"
    if mean > half:
        return "better"
    if budget <= SMALL:
        return "**not shown**"
    if mean < -TIE:
        return "**missed**"
    return f"behind, within {TIE:g}" if mean + half < 0 else "level"


def _readable(arm: str) -> str:
    return arm.replace("_", " ")


def ablations(rows: list[Row]) -> list[str]:
    """UVC minus every other arm: before post-training, and after it with its interval (and pairs)."""
    arms = [arm for arm in (*ARMS, *FORMER) if arm not in MAIN and not arm.endswith(ONE_CYCLE)]
    cases = [case for case in _cases(rows, "epochs") if any(row["arm"] in arms for row in case[1])]
    out = ["| arm | " + " | ".join(f"{task} {budget:g}" for (task, budget), _ in cases) + " |"]
    out.append("|---" * (len(cases) + 1) + "|")
    for arm in arms:
        cells = []
        for _, here in cases:
            by_field = [paired(here, OURS, arm, field) for field in ("before_top1", "after_top1")]
            cell = "{:+.1f}, {:+.2f} ± {:.2f} ({})".format(
                interval(by_field[0])[0], *interval(by_field[1]), len(by_field[1])
            ) if by_field[1] else ""  # fmt: skip
            cells.append(cell)
        if any(cells):
            out.append(line([_readable(arm), *cells]))
    return out if len(out) > 2 else ["No row yet."]


def one_cycle(rows: list[Row]) -> list[str]:
    """One learning-rate cycle over search and post-training, minus one for each: after it, with intervals."""
    searching = [arm.removesuffix(ONE_CYCLE) for arm in FORMER if arm.endswith(ONE_CYCLE)]
    out = ["| task | budget | seeds | " + " | ".join(map(_readable, searching)) + " |"]
    out.append("|---" * (len(searching) + 3) + "|")
    for (task, budget), here in _cases(rows, "epochs"):
        by_arm = [paired(here, arm + ONE_CYCLE, arm, "after_top1") for arm in searching]
        if all(by_arm):
            cells = ("{:+.2f} ± {:.2f}".format(*interval(differences)) for differences in by_arm)
            seeds = ", ".join(str(n) for n in dict.fromkeys(map(len, by_arm)))
            out.append(line([task, f"{budget:g}", seeds, *cells]))
    return out if len(out) > 2 else ["No row yet."]


def blocks(rows: list[Row]) -> dict[str, str]:
    """The text of every block of the page."""
    found = {}
    for mode in ("epochs", "compute"):
        there = any(row["mode"] == mode and row["arm"] == OURS for row in rows)
        found[f"verdict_{mode}"] = "\n".join(verdict(rows, mode)) if there else "No row yet."
        found[f"tables_{mode}"] = render(rows, mode).replace("no rows yet", "No row yet.")
    found["short"] = "\n".join(short(rows))
    found["ablations"] = "\n".join(ablations(rows))
    found["one_cycle"] = "\n".join(one_cycle(rows))
    together = elastic.read()
    found["elastic"] = "\n".join(elastic.table(together, rows))
    found["elastic_stand"] = elastic.stand(together)
    dates = sorted({row["date"] for row in rows})
    counts = {mode: sum(row["mode"] == mode for row in rows) for mode in ("epochs", "compute")}
    found["stand"] = (
        f"{counts['epochs']} rows at equal epochs, {counts['compute']} at equal compute"
        + (f", run from {dates[0]} to {dates[-1]}" if dates else "")
        + "."
    )
    return found


def filled(text: str, rows: list[Row]) -> str:
    """`text` with every block of this bench between its markers written anew."""
    return between_markers(text, "quality", blocks(rows))


def between_markers(text: str, bench: str, texts: dict[str, str]) -> str:
    """`text` with `texts` between the markers of a bench; KeyError on an unknown name."""

    def write(match: re.Match) -> str:
        return f"{match[1]}\n{texts[match[2]]}\n{match[3]}"

    return re.sub(rf"(<!-- {bench} (\w+) -->).*?(<!-- /{bench} \2 -->)", write, text, flags=re.S)


def write(rows: list[Row], results: Path, docs: Path) -> None:
    """The page, the pictures beside it, and the README above it."""
    for page in (docs / "quality.md", docs.parent / "README.md"):
        page.write_text(filled(page.read_text(), rows))
    for mode, name in (("epochs", "quality_curves.png"), ("compute", "quality_curves_compute.png")):
        here = [row for row in rows if row["mode"] == mode]
        if here:
            curves(here).savefig(docs / name, dpi=110)
    structures(rows).savefig(docs / "quality_structures.png", dpi=110)
    file = results.with_name(TRACES)
    if latest := read_rows(file, VERSION):
        traces(latest).savefig(docs / "quality_traces.png", dpi=110)


def curves(rows: list[Row]):
    """Accuracy over budget, before and after post-training, with 95% intervals; all rows of one mode."""
    from matplotlib.figure import Figure

    tasks = sorted({row["task"] for row in rows})
    figure = Figure(figsize=(5.2 * 2, 3.9 * len(tasks)), facecolor="white", layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for pictures, task in zip(axes, tasks, strict=True):
        for axis, field in zip(pictures, ("before_top1", "after_top1"), strict=True):
            for colour, arm in zip(COLOURS, [a for a in MAIN if ARMS[a].budgeted], strict=False):
                points = []
                for (_, budget), here in _cases([r for r in rows if r["task"] == task], rows[0]["mode"]):
                    values = [float(r[field]) for r in here if r["arm"] == arm]
                    if values:
                        mean, half = interval(values)
                        points.append((budget, mean, half if len(values) > 1 else 0.0))
                if points:
                    x, y, error = zip(*sorted(points), strict=True)
                    axis.errorbar(
                        x, y, error, color=colour, marker="o", markersize=4, capsize=3, label=_readable(arm),
                        linewidth=2 if arm == OURS else 1.2,
                    )  # fmt: skip
            dense = [float(r["after_top1"]) for r in rows if r["task"] == task and r["arm"] == "dense_extra"]
            if dense and field == "after_top1":
                axis.axhline(
                    sum(dense) / len(dense), color="#2b2b2b", linestyle=":", label="dense, trained on as well"
                )
            low, high = axis.get_ylim()
            if dense and field == "after_top1":
                low = max(low, sum(dense) / len(dense) - BELOW)  # what is further down is cut off
            axis.set_ylim(max(low, 0.0), min(high, 100.0))
            axis.set_xlabel("MACs kept (budget)")
            axis.set_ylabel("top-1, %")
            axis.set_title(
                f"{task}, {'before' if field == 'before_top1' else 'after'} post-training", fontsize=10
            )
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def structures(rows: list[Row]):
    """What UVC keeps in each block, mean over seeds: q/k dims, v dims, neurons, as numbers of groups."""
    from matplotlib.figure import Figure

    cases = [(case, [r for r in here if r["arm"] == OURS]) for case, here in _cases(rows, "epochs")]
    cases = [(case, here) for case, here in cases if here]
    tasks = sorted({case[0] for case, _ in cases})
    figure = Figure(figsize=(3.6 * 3, 2.9 * max(len(tasks), 1)), facecolor="white", layout="constrained")
    axes = figure.subplots(max(len(tasks), 1), 3, squeeze=False)
    for pictures, task in zip(axes, tasks, strict=False):
        here = [(budget, rows) for (name, budget), rows in cases if name == task]
        for which, (axis, name) in enumerate(zip(pictures, ("q/k dims", "v dims", "neurons"), strict=True)):
            for colour, (budget, own) in zip(COLOURS, here, strict=False):
                kept = [kept_of(row["structure"]) for row in own]
                heights = [sum(k[i][which] for k in kept) / len(kept) for i in range(len(kept[0]))]
                axis.plot(
                    range(1, len(heights) + 1), heights, color=colour, marker="o", markersize=4,
                    label=f"budget {budget:g}",
                )  # fmt: skip
            axis.set_title(f"{task}: {name} kept", fontsize=10)
            axis.set_xlabel("block")
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        pictures[-1].legend(fontsize=7, frameon=False)
    return figure


def kept_of(structure: str) -> list[tuple[int, int, int]]:
    """Per block, q/k dims, v dims and neurons kept, from the column `structure`."""
    found = []
    for block in structure.split("|"):
        attention, neurons = block.split(" ")[:2]
        heads = [head.split("/") for head in attention.split("+") if "/" in head]
        qk, v = (sum(int(head[i]) for head in heads) for i in (0, 1))
        found.append((qk, v, 0 if neurons == "-" else int(neurons)))
    return found


def traces(rows: list[Row]):
    """Cost and duals over the search of one seed, for every task and budget."""
    from matplotlib.figure import Figure

    tasks = sorted({row["task"] for row in rows})
    figure = Figure(figsize=(5.2 * 2, 3.3 * len(tasks)), facecolor="white", layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for pictures, task in zip(axes, tasks, strict=True):
        budgets = sorted({float(row["budget"]) for row in rows if row["task"] == task}, reverse=True)
        for colour, budget in zip(COLOURS, budgets, strict=False):
            own = [row for row in rows if row["task"] == task and float(row["budget"]) == budget]
            steps = [int(row["step"]) for row in own]
            for axis, field, style in ((0, "target", ":"), (0, "hard_cost", "-"), (1, "z", "-")):
                label = f"budget {budget:g}" if style == "-" else None
                values = [float(row[field]) for row in own]
                pictures[axis].plot(steps, values, color=colour, linestyle=style, label=label)
            y = [max(float(row[f"y_{name}"]) for name in ("qk", "v", "neuron")) for row in own]
            pictures[1].plot(steps, y, color=colour, linestyle="--")
        pictures[0].set_title(f"{task}: cost (solid) and its target (dotted)", fontsize=10)
        pictures[1].set_title(f"{task}: z (solid), largest mean y (dashed)", fontsize=10)
        for axis in pictures:
            axis.set_xlabel("training step of the search")
            axis.spines[["top", "right"]].set_visible(False)
        pictures[0].legend(fontsize=7, frameon=False)
    return figure

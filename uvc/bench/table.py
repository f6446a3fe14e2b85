"""The last word of a run: speed-ups with their noise band, the cap, and the fraction of it reached."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from uvc.bench.rows import BASES, Row, labelled
from uvc.config import SolverConfig

# The solver alone.
SOLVER = {"solver": "solver", "solver_removing": "solver when groups die"}
OPS = ("plain_torch", "kernel")
LEGEND = (
    "times as fast as eager dense timm (ops: as plain torch) in the same rounds; a second run agrees within",
    "the noise band.",
    "x best: than the faster of eager and compiled dense timm. cap: what this structure gains if dense and",
    "pruned both run at the roof. of cap: x best / cap; above 100% dense is further from its roof than this.",
    "of roof: least possible time / time, by the ceilings that this session measured.",
)


def lines(rows: Sequence[Row]) -> list[str]:
    """Every row of whole models; of layers and ops a line per kernel, with the other variants beside it."""
    if not rows:
        return ["nothing was measured"]
    out = []
    for (suite, is_op), group in groupby(rows, key=lambda row: (row.suite, row.variant in OPS)):
        show = ops if is_op else layers if suite == "kernels" else full
        members = list(group)
        out += show(members)
        if show is full and fractions(members):
            out += ["", *ratios(members)]
    return [*out, "", *LEGEND]


def full(rows: Iterable[Row]) -> list[str]:
    """A line per row."""
    out = []
    for title, members in groupby(rows, key=lambda row: f"{row.model} {row.what}, {_setting(row)}"):
        out += [
            "",
            title,
            f"{'':34} {'ms':>9} {'x dense':>8} {'noise':>7} {'x best':>7} {'cap':>5} {'of cap':>7} "
            f"{'GFLOP/s':>9} {'of roof':>8} {'MiB':>8}",
        ]
        out += [
            f"{f'keep {r.keep:<4g} {labelled(r)}':34} {r.ms:9.2f} {r.speedup:8.2f} {_band(r):>7} "
            f"{r.speedup_best:7.2f} {r.cap:5.2f} {r.cap_fraction:7.0%} {r.gflop_per_s:9.1f} "
            f"{r.roofline:8.0%} {r.peak_mib:8.0f}"
            for r in members
            if r.variant not in SOLVER
        ]
    return out


def layers(rows: list[Row]) -> list[str]:
    """A line per kernel and group: its time, speed-up, cap; then the speed-ups of what else one could do."""
    others = list(dict.fromkeys(_beside(row) for row in rows if not _ours(row) and row.variant not in BASES))
    out = [
        "",
        f"single layers, {_setting(rows[0], batch=False)}; to the right the speed-ups of the other variants",
        f"{'':42} {'ms':>8} {'x dense':>8} {'noise':>7} {'x best':>7} {'cap':>5} {'of cap':>7} "
        f"{'of roof':>8}   " + " ".join(f"{variant:>10}" for variant in others),
    ]
    for _, group in groupby(rows, key=lambda row: (row.model, row.what, row.batch, row.keep)):
        members = list(group)
        beside = {_beside(row): row.speedup for row in members if not _ours(row)}
        # Where nothing was built, plain torch serves.
        for r in [row for row in members if _ours(row)] or [
            row for row in members if row.variant == "on_the_fly"
        ]:
            name = f"{r.model.removeprefix('deit_')} {r.what}, keep {r.keep:g}, {r.backend}"
            out.append(
                f"{name:42} {r.ms:8.3f} {r.speedup:8.2f} {_band(r):>7} {r.speedup_best:7.2f} {r.cap:5.2f} "
                f"{r.cap_fraction:7.0%} {r.roofline:8.0%}   "
                + " ".join(f"{beside[each]:10.2f}" if each in beside else f"{'':10}" for each in others)
            )
    return out


def ops(rows: list[Row]) -> list[str]:
    """A line per kernel of an op over all layers, beside plain torch."""
    out = [
        "",
        "one call for all layers, weights in float32",
        f"{'':42} {'ms':>8} {'plain':>8} {'x plain':>8} {'noise':>7} {'cap':>5} {'of cap':>7} {'GB/s':>8} "
        f"{'of roof':>8}",
    ]
    for _, group in groupby(rows, key=lambda row: (row.model, row.what, row.keep)):
        base, *kernels = group
        for r in kernels:
            name = f"{r.model.removeprefix('deit_')} {r.what}, keep {r.keep:g}, {r.backend}"
            out.append(
                f"{name:42} {r.ms:8.3f} {base.ms:8.3f} {r.speedup:8.2f} {_band(r):>7} {r.cap:5.2f} "
                f"{r.cap_fraction:7.0%} {r.gbyte_per_s:8.1f} {r.roofline:8.0%}"
            )
    return out


class Fraction(NamedTuple):
    """A training step as a fraction of another: time, its noise band, memory of the step, and that with what
    stands between steps: parameters and optimiser.
    """

    row: Row
    other: Row
    time: float
    noise: float
    memory: float
    memory_with_standing: float


def fractions(rows: Iterable[Row]) -> list[Fraction]:
    """On the fly as fractions of compacted and of dense, converted of dense, at every kept fraction."""
    out = []
    for members in _steps(rows):
        variants = {row.variant: row for row in members}
        for r in members:
            against = {"converted": ("dense",), "on_the_fly": ("compacted", "dense")}.get(r.variant, ())
            for other in (variants[variant] for variant in against if variant in variants):
                dense = other.variant == "dense"
                speedup = r.speedup if dense else r.speedup_compacted
                whole = (r.peak_mib + r.standing_mib) / (other.peak_mib + other.standing_mib)
                noise = r.noise if dense else r.noise_compacted
                out.append(Fraction(r, other, 1 / speedup, noise, r.peak_mib / other.peak_mib, whole))
    return out


def solver_shares(rows: Iterable[Row]) -> list[tuple[Row, float]]:
    """Each row of the solver alone, and the fraction of a search step on the fly that it takes."""
    every, out = SolverConfig().every, []
    for members in _steps(rows):
        variants = {row.variant: row for row in members}
        for solver in (variants[each] for each in SOLVER if each in variants and "on_the_fly" in variants):
            mean = solver.ms / every
            out.append((solver, mean / (variants["on_the_fly"].ms + mean)))
    return out


def ratios(rows: Sequence[Row]) -> list[str]:
    """`fractions` and `solver_shares` of training steps as lines."""
    out = [
        "time and memory of a training step as fractions of another; standing: parameters and optimiser",
        f"{'':46} {'time':>7} {'noise':>7} {'memory':>8} {'with standing':>14}",
    ]
    for f in fractions(rows):
        name = f"keep {f.row.keep:<4g} {labelled(f.row)} / {f.other.variant}"
        band = f"±{f.noise:.1%}"
        out.append(f"{name:46} {f.time:7.3f} {band:>7} {f.memory:8.3f} {f.memory_with_standing:14.3f}")
    for row, share in solver_shares(rows):
        name = f"keep {row.keep:<4g} {SOLVER[row.variant]} / search step"
        out.append(f"{name:46} {share:7.2%}  ({row.ms:.2f} ms once in {SolverConfig().every} steps)")
    return out


def _steps(rows: Iterable[Row]) -> list[list[Row]]:
    """Training steps that were timed side by side."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.what == "training":
            key = (row.device, row.suite, row.model, row.batch, row.dtype, row.threads, row.keep)
            groups.setdefault(key, []).append(row)
    return list(groups.values())


def _ours(row: Row) -> bool:
    return row.variant == "on_the_fly" and row.backend != "reference"


def _beside(row: Row) -> str:
    return row.backend if row.variant == "on_the_fly" else row.variant


def _band(row: Row) -> str:
    return f"±{row.noise:.0%}"


def _setting(row: Row, batch: bool = True) -> str:
    parts = [f"batch {row.batch}"] if batch else []
    parts.append(row.dtype)
    if row.threads:
        parts.append(f"{row.threads} thread{'s' * (row.threads > 1)}")
    return ", ".join(parts)

"""The last word of a run: speed-ups with their noise band, the cap, and the fraction of it reached."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from uvc.bench.rows import Row, labelled

LEGEND = (
    "times as fast as eager dense timm in the same rounds; a second run agrees within the noise band.",
    "x best: than the faster of eager and compiled dense timm. cap: what this structure gains if dense and",
    "pruned both run at the roof. of cap: x best / cap; above 100% dense is further from its roof than this.",
    "of roof: least possible time / time, by the ceilings that this session measured.",
)


def lines(rows: Sequence[Row]) -> list[str]:
    """Every row of whole models; of single layers a line per kernel, with the other ways beside it."""
    if not rows:
        return ["nothing was measured"]
    out = []
    for suite, group in groupby(rows, key=lambda row: row.suite):
        members = list(group)
        out += layers(members) if suite == "kernels" else full(members)
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
        ]
    return out


def layers(rows: list[Row]) -> list[str]:
    """A line per kernel and group: its time, speed-up, cap; then the speed-ups of what else one could do."""
    others = list(dict.fromkeys(_beside(row) for row in rows if not _ours(row) and row.way != "dense"))
    out = [
        "",
        f"single layers, {_setting(rows[0], batch=False)}; to the right the speed-ups of the other ways",
        f"{'':42} {'ms':>8} {'x dense':>8} {'noise':>7} {'x best':>7} {'cap':>5} {'of cap':>7} "
        f"{'of roof':>8}   " + " ".join(f"{way:>10}" for way in others),
    ]
    for _, group in groupby(rows, key=lambda row: (row.model, row.what, row.batch, row.keep)):
        members = list(group)
        beside = {_beside(row): row.speedup for row in members if not _ours(row)}
        for r in (row for row in members if _ours(row)):
            name = f"{r.model.removeprefix('deit_')} {r.what}, keep {r.keep:g}, {r.backend}"
            out.append(
                f"{name:42} {r.ms:8.3f} {r.speedup:8.2f} {_band(r):>7} {r.speedup_best:7.2f} {r.cap:5.2f} "
                f"{r.cap_fraction:7.0%} {r.roofline:8.0%}   "
                + " ".join(f"{beside[way]:10.2f}" if way in beside else f"{'':10}" for way in others)
            )
    return out


def _ours(row: Row) -> bool:
    return row.way == "on_the_fly" and row.backend != "reference"


def _beside(row: Row) -> str:
    return row.backend if row.way == "on_the_fly" else row.way


def _band(row: Row) -> str:
    return f"±{row.noise:.0%}"


def _setting(row: Row, batch: bool = True) -> str:
    parts = [f"batch {row.batch}"] if batch else []
    parts.append(row.dtype)
    if row.threads:
        parts.append(f"{row.threads} thread{'s' * (row.threads > 1)}")
    return ", ".join(parts)

"""The last word of a run: speed-ups with their noise band, the cap, and the fraction of it that was reached."""

import math
from collections.abc import Sequence

from uvc.bench.rows import Row, labelled

COLUMNS = (
    f"{'':34} {'ms':>8} {'p20':>8} {'p80':>8} {'x dense':>8} {'noise':>6} {'x best':>7} {'cap':>5} "
    f"{'of cap':>6} {'GFLOP/s':>8} {'of roof':>7}"
)
LEGEND = (
    "x dense: times as fast as eager dense timm, in the same rounds; a second run agrees within noise. x best: than the "
    "faster\nof eager and compiled. cap: what this structure could gain at most; of cap: x best / cap. of roof: least "
    "possible time / time."
)


def lines(rows: Sequence[Row]) -> list[str]:
    """The table, group by group."""
    out, last = [], None
    for row in rows:
        group = (row.suite, row.model, row.what, row.dtype, row.batch, row.threads, row.keep)
        if group != last:
            if last is None or group[:-1] != last[:-1]:
                threads = f", {row.threads} thread{'s' * (row.threads != 1)}" if row.threads else ""
                title = f"{row.suite}: {row.model} {row.what}, batch {row.batch}, {row.dtype}{threads}"
                out += ["", title, COLUMNS]
            last = group
        out.append(_line(row))
    return [*out, "", LEGEND] if out else ["nothing was measured"]


def _line(row: Row) -> str:
    name = f"keep {row.keep:<4g} {labelled(row)}"
    return (
        f"{name:34} {row.ms:8.3f} {row.p20:8.3f} {row.p80:8.3f} {row.speedup:8.2f} {row.noise:6.0%} "
        f"{row.speedup_best:7.2f} {row.cap:5.2f} {_share(row.cap_fraction):>6} {row.gflop_per_s:8.1f} "
        f"{_share(row.roofline):>7}"
    )


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"

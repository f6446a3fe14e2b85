"""Small SVG charts whose colours are classes of the page that holds them; every text is escaped."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from markupsafe import Markup

from uvc.io.drawing import svg

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 22, 38
COLOURS = 6  # classes c0 to c5
LABELS = ((0, -9), (12, 4), (-12, 4), (0, 17), (12, -9), (-12, -9), (12, 17), (-12, 17))


class Point(NamedTuple):
    """A labelled point of a run: `number` chooses its colour; a ring is what the run began with."""

    number: int
    label: str
    x: float
    y: float
    ring: bool = False


class Line(NamedTuple):
    """A named curve."""

    name: str
    points: Sequence[tuple[float, float]]


class Share(NamedTuple):
    """What attention and MLP of a block cost, or what is outside the blocks, and what that was before."""

    label: str
    attn: float
    mlp: float
    outside: float
    dense: float


def scatter(points: Sequence[Point], x: str, y: str) -> Markup:
    """Points with their numbers above them, and rings."""
    place, parts = _axes([p.x for p in points], [p.y for p in points], x, y, room=0.08)
    used: list[tuple[float, float]] = []
    for point in points:
        at, up = place(point.x, point.y)
        said = escape(f"{point.label}: {point.x:.4g}, {point.y:.4g}")
        kind = f"ring l{point.number % COLOURS}" if point.ring else f"c{point.number % COLOURS}"
        circle = f'<circle class="{kind}" cx="{at:.1f}" cy="{up:.1f}" r="5">'
        parts.append(f"{circle}<title>{said}</title></circle>")
        if not point.ring:
            around = [(at + across, up + down) for across, down in LABELS]
            # Beside its point, where no other number stands.
            used.append(next((p for p in around if all(math.dist(p, q) > 13 for q in used)), around[0]))
            text = '<text x="{:.1f}" y="{:.1f}" text-anchor="middle">'.format(*used[-1])
            parts.append(f"{text}{point.number + 1}</text>")
    return _svg(parts, f"{y} over {x}")


def curves(lines: Sequence[Line], x: str) -> Markup:
    """Curves over one axis, with their names below."""
    xs, ys = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    place, parts = _axes(xs, ys, x, "")
    for i, line in enumerate(lines):
        step = max(1, len(line.points) // 400)  # more than the page has pixels for
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in line.points[::step]))
        parts.append(f'<polyline class="l{i % COLOURS}" points="{path}"/>')
        row, column = divmod(i, 3)
        at, up = LEFT + 104 * column, HEIGHT + 14 * row + 8
        parts.append(f'<rect class="c{i % COLOURS}" x="{at}" y="{up - 8}" width="9" height="9"/>')
        parts.append(f'<text x="{at + 13}" y="{up}">{escape(line.name)}</text>')
    return _svg(parts, ", ".join(line.name for line in lines), HEIGHT + 14 * -(-len(lines) // 3))


def shares(rows: Sequence[Share], unit: str) -> Markup:
    """A bar per row: attention, then MLP, over what both cost before; the shares of that at the right."""
    longest = max(row.dense for row in rows) or 1.0
    wide, parts = WIDTH - RIGHT - 92, [f'<text x="50" y="12">{escape(unit)}, and what is left of it</text>']
    for i, row in enumerate(rows):
        y, left = 18 + 24 * i, row.attn + row.mlp + row.outside
        parts.append(f'<text x="44" y="{y + 13}" text-anchor="end">{escape(row.label)}</text>')
        x = 50.0
        parts.append(_rect("removed", x, y, wide * row.dense / longest, row.label, row.dense))
        kinds = (("c0", "attention", row.attn), ("c2", "MLP", row.mlp), ("c5", "outside", row.outside))
        for kind, what, value in kinds:
            parts.append(_rect(kind, x, y, wide * value / longest, f"{row.label}, {what}", value))
            x += wide * value / longest
        share = f"{left / row.dense:.0%}" if row.dense else ""
        parts.append(f'<text x="{WIDTH - 4}" y="{y + 13}" text-anchor="end">{share}</text>')
    return _svg(parts, f"{unit} of {len(rows)} parts", 22 + 24 * len(rows))


def _rect(kind: str, x: float, y: float, width: float, what: str, value: float) -> str:
    shape = f'<rect class="{kind}" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="17">'
    return f"{shape}<title>{escape(what)}: {value:,.4g}</title></rect>"


def _axes(xs: Sequence[float], ys: Sequence[float], x: str, y: str, room: float = 0.0):
    """What places a point, and the frame with round numbers along it."""
    (x0, x1), (y0, y1) = _span(xs, room), _span(ys, 0.08)
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(a: float, b: float) -> tuple[float, float]:
        return LEFT + (a - x0) / (x1 - x0) * (right - LEFT), low - (b - y0) / (y1 - y0) * (low - TOP)

    parts = [f'<path class="frame" d="M{LEFT} {TOP}V{low}H{right}"/>']
    for a in ticks(x0, x1):
        at, _ = place(a, y0)
        parts.append(f'<text x="{at:.1f}" y="{low + 15}" text-anchor="middle">{a:g}</text>')
    for b in ticks(y0, y1):
        _, up = place(x0, b)
        parts.append(f'<text x="{LEFT - 5}" y="{up + 4:.1f}" text-anchor="end">{b:g}</text>')
        parts.append(f'<path class="grid" d="M{LEFT} {up:.1f}H{right}"/>')
    parts.append(f'<text x="{right}" y="{low + 30}" text-anchor="end">{escape(x)}</text>')
    parts.append(f'<text x="4" y="{TOP - 10}">{escape(y)}</text>' if y else "")
    return place, parts


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(m * power for m in (5, 2, 1) if (high - low) / (m * power) >= 3)
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def _span(values: Sequence[float], room: float) -> tuple[float, float]:
    """The range of the values, wider by `room` of it on both sides; never empty."""
    low, high = min(values), max(values)
    wider = room * (high - low) if high - low > 1e-6 * abs(high) else 0.1 * abs(high) or 1.0
    return low - wider, high + wider


def _svg(parts: Sequence[str], label: str, height: float = HEIGHT) -> Markup:
    return Markup(svg(parts, label, WIDTH, height))

"""Small SVG charts whose colours are classes of the page that holds them; every text is escaped."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from uvc.structure import BlockStructure, Structure

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38
COLOURS = 6  # classes c0 to c5


class Point(NamedTuple):
    """A labelled point."""

    label: str
    x: float
    y: float


class Line(NamedTuple):
    """A named curve."""

    name: str
    points: Sequence[tuple[float, float]]


def scatter(points: Sequence[Point], x: str, y: str) -> Markup:
    """Points with labels beside them."""
    place, parts = _axes([p.x for p in points], [p.y for p in points], x, y)
    for i, point in enumerate(points):
        at, up = place(point.x, point.y)
        said = escape(f"run {point.label}: {point.x:.4g}, {point.y:.4g}")
        circle = f'<circle class="c{i % COLOURS}" cx="{at:.1f}" cy="{up:.1f}" r="5">'
        parts.append(f"{circle}<title>{said}</title></circle>")
        parts.append(f'<text x="{at:.1f}" y="{up - 9:.1f}" text-anchor="middle">{escape(point.label)}</text>')
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


def _axes(xs: Sequence[float], ys: Sequence[float], x: str, y: str):
    """What places a point, and the frame with the numbers at its ends."""
    (x0, x1), (y0, y1) = _span(xs), _span(ys)
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(a: float, b: float) -> tuple[float, float]:
        return LEFT + (a - x0) / (x1 - x0) * (right - LEFT), low - (b - y0) / (y1 - y0) * (low - TOP)

    parts = [f'<path class="frame" d="M{LEFT} {TOP}V{low}H{right}"/>']
    for i in range(5):
        a, b = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        (at, _), (_, up) = place(a, y0), place(x0, b)
        parts.append(f'<text x="{at:.1f}" y="{low + 14}" text-anchor="middle">{a:.3g}</text>')
        parts.append(f'<text x="{LEFT - 5}" y="{up + 4:.1f}" text-anchor="end">{b:.3g}</text>')
        parts.append(f'<path class="grid" d="M{LEFT} {up:.1f}H{right}"/>')
    parts.append(f'<text x="{right}" y="{low + 28}" text-anchor="end">{escape(x)}</text>')
    parts.append(f'<text x="{LEFT + 4}" y="{TOP + 2}">{escape(y)}</text>' if y else "")
    return place, parts


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, a little wider; never empty."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _svg(parts: Sequence[str], label: str, height: float = HEIGHT, width: float = WIDTH) -> Markup:
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{start}{''.join(parts)}</svg>")


def structure_picture(structure: "Structure", dense: "Structure") -> Markup:
    """A row per block: each head's kept q/k dims above its kept v dims, then the kept neurons, as bars."""
    row, parts = 24, []
    for x, label in ((26, "heads: q/k dims over v dims"), (200, "neurons")):
        parts.append(f'<text x="{x}" y="10">{label}</text>')
    for i, (kept, full) in enumerate(zip(structure.blocks, dense.blocks, strict=True)):
        y = 16 + i * row
        parts.append(f'<text x="18" y="{y + 13}" text-anchor="end">{i}</text>')
        parts.append(_attention(kept, full, y) if kept.attn else _skipped(26, y, 164, "attention skipped"))
        if kept.mlp:
            parts.append(_bar(200, y, 110, 17, "c2", len(kept.neurons), len(full.neurons), "neurons"))
            parts.append(f'<text x="356" y="{y + 13}" text-anchor="end">{len(kept.neurons)}</text>')
        else:
            parts.append(_skipped(200, y, 110, "MLP skipped"))
        if kept.tokens is not None:
            start = f'<text class="small" x="190" y="{y + 22}" text-anchor="end">'
            parts.append(f"{start}{kept.tokens} tokens go on</text>")
    return _svg(parts, f"structure of {len(dense.blocks)} blocks", 20 + row * len(dense.blocks))


def _attention(kept: "BlockStructure", full: "BlockStructure", y: float) -> str:
    dims = dict(zip(kept.heads, zip(kept.qk_dims, kept.v_dims, strict=True), strict=True))
    width, parts = 164 / len(full.heads), []
    for i, head in enumerate(full.heads):
        qk, v = dims.get(head, ((), ()))
        x, wide = 26 + i * width, width - min(2, width / 4)
        parts.append(_bar(x, y, wide, 8, "c0", len(qk), len(full.qk_dims[i]), f"head {head}: q/k dims"))
        parts.append(_bar(x, y + 9, wide, 8, "c1", len(v), len(full.v_dims[i]), f"head {head}: v dims"))
    return "".join(parts)


def _bar(x: float, y: float, width: float, height: float, colour: str, kept: int, of: int, what: str) -> str:
    filled = width * kept / of if of else 0
    return (
        f'<rect class="removed" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}"/>'
        f'<rect class="{colour}" x="{x:.2f}" y="{y:g}" width="{filled:.2f}" height="{height:g}">'
        f"<title>{what}: {kept} of {of}</title></rect>"
    )


def _skipped(x: float, y: float, width: float, label: str) -> str:
    return (
        f'<rect class="skipped" x="{x:g}" y="{y:g}" width="{width:g}" height="17"/>'
        f'<text class="small" x="{x + width / 2:g}" y="{y + 12:g}" text-anchor="middle">{label}</text>'
    )

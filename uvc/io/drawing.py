"""The picture of a structure as SVG: within a page, whose style colours it, or as a file of its own."""

from collections.abc import Sequence
from html import escape

from uvc.structure import BlockStructure, Structure

# For a file, whose reader may have a dark screen: on white.
STYLE = (
    "<style>svg{background:#fff}text{font:11px system-ui,sans-serif;fill:#22262b}"
    "text.small{font-size:9.5px;fill:#5d656e}.removed{fill:#d3d8de}.c0{fill:#3b6fb6}.c1{fill:#d9822b}"
    ".c2{fill:#3a8f6b}.skipped{fill:none;stroke:#5d656e;stroke-dasharray:4 3}</style>"
)


def svg(parts: Sequence[str], label: str, width: float, height: float) -> str:
    """One picture of these parts, as wide as the page lets it be."""
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return f"{start}{''.join(parts)}</svg>"


def as_file(picture: str) -> str:
    """A picture with its colours, for a file of its own."""
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f">{STYLE}", 1
    )


def structure_picture(structure: Structure, dense: Structure) -> str:
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
    return svg(parts, f"structure of {len(dense.blocks)} blocks", 360, 20 + row * len(dense.blocks))


def _attention(kept: BlockStructure, full: BlockStructure, y: float) -> str:
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

"""The picture of a structure: a row per block, a cell per dim and neuron, kept in colour, removed in grey."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from uvc.structure import BlockStructure, Structure

QK, V, NEURON = "#3b6fb6", "#d9822b", "#3a8f6b"
REMOVED, INK, FAINT = "#e6e6e3", "#2b2b2b", "#9a9a96"

# Inches: a row, the gap below it, and the columns of the page.
ROW, GAP = 0.46, 0.2
STREAM, ATTENTION, ATTENTION_TEXT, MLP, MLP_TEXT, PAGE = 0.65, 0.95, 6.1, 7.3, 11.45, 12.3
HEADING, FOOTING = 0.85, 0.6


def structure_figure(structure: "Structure", dense: "Structure", title: str) -> "Figure":
    """A matplotlib figure of `structure` within `dense`; no window opens, no global state is touched."""
    from matplotlib.figure import Figure

    rows = len(dense.blocks)
    height = HEADING + rows * (ROW + GAP) + FOOTING
    figure = Figure(figsize=(PAGE, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, PAGE)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(0.3, 0.32, title, fontsize=13, color=INK, weight="bold", va="center")
    for x, label in (
        (ATTENTION, "attention: heads, upper lane q/k dims, lower lane v dims"),
        (MLP, "MLP: neurons"),
    ):
        axes.text(x, HEADING - 0.14, label, fontsize=8.5, color=INK, va="center")
    axes.plot(
        [STREAM, STREAM], [HEADING - 0.1, height - FOOTING + 0.05], color=FAINT, linewidth=1.2, zorder=1
    )
    for i, (block, full) in enumerate(zip(structure.blocks, dense.blocks, strict=True)):
        top = HEADING + i * (ROW + GAP)
        axes.text(STREAM - 0.28, top + ROW / 2, str(i + 1), fontsize=9, color=INK, ha="center", va="center")
        if block.tokens is not None:
            text = f"{block.tokens} tokens"
            axes.text(STREAM - 0.28, top + ROW, text, fontsize=5.5, color=INK, ha="center", va="center")
        _attention(axes, top, block, full)
        _mlp(axes, top, block, full)
    _legend(axes, height - FOOTING / 2)
    return figure


def _attention(axes: "Axes", top: float, block: "BlockStructure", full: "BlockStructure") -> None:
    width = ATTENTION_TEXT - ATTENTION - 0.15
    _stream_dot(axes, top + ROW * 0.25, block.attn)
    if not block.attn:
        _skipped(axes, ATTENTION, top, width, "attention skipped")
        return
    kept = dict(zip(block.heads, zip(block.qk_dims, block.v_dims, strict=True), strict=True))
    lane = (ROW - 0.04) / 2
    gap = 0.06
    head_width = (width - gap * (len(full.heads) - 1)) / len(full.heads)
    for i, head in enumerate(full.heads):
        left = ATTENTION + i * (head_width + gap)
        qk, v = kept.get(head, ((), ()))
        _cells(axes, left, top, head_width, lane, qk, full.qk_dims[i], QK)
        _cells(axes, left, top + lane + 0.04, head_width, lane, v, full.v_dims[i], V)
        if head not in kept:
            axes.plot([left, left + head_width], [top + ROW, top], color="white", linewidth=2.5, zorder=4)
            axes.plot([left, left + head_width], [top + ROW, top], color=FAINT, linewidth=0.8, zorder=5)
    qk_share = _share(block.qk_dims, full.qk_dims)
    text = (
        f"{len(block.heads)}/{len(full.heads)} heads\nq/k {qk_share}  v {_share(block.v_dims, full.v_dims)}"
    )
    axes.text(ATTENTION_TEXT, top + ROW / 2, text, fontsize=7.5, color=INK, va="center", linespacing=1.35)


def _mlp(axes: "Axes", top: float, block: "BlockStructure", full: "BlockStructure") -> None:
    width = MLP_TEXT - MLP - 0.15
    _stream_dot(axes, top + ROW * 0.75, block.mlp)
    if not block.mlp:
        _skipped(axes, MLP, top, width, "MLP skipped")
        return
    _cells(axes, MLP, top, width, ROW, block.neurons, full.neurons, NEURON)
    text = f"{len(block.neurons)}/{len(full.neurons)}\n{_share([block.neurons], [full.neurons])}"
    axes.text(MLP_TEXT, top + ROW / 2, text, fontsize=7.5, color=INK, va="center", linespacing=1.35)


def _cells(
    axes: "Axes", left: float, top: float, width: float, height: float, kept: tuple, full: tuple, colour: str
) -> None:
    """A grid of near-square cells, one per index of `full`, filled row by row."""
    from matplotlib.colors import to_rgb

    if not full:
        return
    lines = _lines(len(full), height / width)
    columns = -(-len(full) // lines)
    pixels = np.ones((lines * columns, 3))
    pixels[: len(full)] = to_rgb(REMOVED)
    pixels[np.isin(full, kept).nonzero()[0]] = to_rgb(colour)
    extent = (left, left + width, top + height, top)
    axes.imshow(
        pixels.reshape(lines, columns, 3), extent=extent, aspect="auto", interpolation="nearest", zorder=2
    )
    # White lines between the cells, as long as these are large enough to be told apart.
    if width / columns > 0.035:
        for i in range(1, columns):
            x = left + i * width / columns
            axes.plot([x, x], [top, top + height], color="white", linewidth=0.5, zorder=3)
        for i in range(1, lines):
            y = top + i * height / lines
            axes.plot([left, left + width], [y, y], color="white", linewidth=0.5, zorder=3)


def _lines(cells: int, aspect: float) -> int:
    """Lines of a grid of near-square cells: a divisor of `cells` if one is near, so no corner stays empty."""
    ideal = max(1.0, math.sqrt(cells * aspect))
    nearest = min(
        (n for n in range(1, cells + 1) if cells % n == 0), key=lambda n: abs(math.log(n / ideal)), default=1
    )
    return nearest if abs(math.log(nearest / ideal)) < math.log(2) else round(ideal)


def _stream_dot(axes: "Axes", y: float, runs: bool) -> None:
    """The residual stream passes by a half: full dot when the half runs, hollow when it is skipped."""
    axes.plot(STREAM, y, "o", markersize=5.5, color=INK if runs else FAINT, zorder=4)
    if not runs:
        axes.plot(STREAM, y, "o", markersize=3.5, color="white", zorder=5)


def _skipped(axes: "Axes", left: float, top: float, width: float, label: str) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle(
        (left, top), width, ROW, fill=False, edgecolor=FAINT, linewidth=0.9, linestyle=(0, (4, 3))
    )
    axes.add_patch(box)
    axes.text(
        left + width / 2,
        top + ROW / 2,
        label,
        fontsize=8,
        color=FAINT,
        style="italic",
        ha="center",
        va="center",
    )


def _legend(axes: "Axes", y: float) -> None:
    entries = ((QK, "q/k dim"), (V, "v dim"), (NEURON, "neuron"), (REMOVED, "removed"))
    for i, (colour, label) in enumerate(entries):
        x = ATTENTION + 1.15 * i
        axes.plot(x + 0.07, y, "s", markersize=8, color=colour)
        axes.text(x + 0.22, y, label, fontsize=8.5, color=INK, va="center")


def _share(kept: Iterable[tuple], full: Iterable[tuple]) -> str:
    total = sum(map(len, full))
    return f"{100 * sum(map(len, kept)) / total:.0f}%" if total else "0%"

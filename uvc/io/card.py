"""The card of a model folder: README.md, with a header that model hubs read, and the picture beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from uvc.costs import counts, prices, total
from uvc.io.drawing import as_file, structure_picture
from uvc.io.files import write_text
from uvc.structure import Structure

CARD, PICTURE = "README.md", "structure.svg"
MADE = "<!-- made by uvc.save; a README.md without this line is left as it is -->"
UNITS = {"macs": "MACs per image", "params": "parameters"}
SHOWN = 20  # names of classes


class Subject(NamedTuple):
    """What a card is of. model: on any device, without hooks, as its structure need not be set.

    images: what `preprocessing_of` says. summary: `summary.json` of the run that made it, for accuracy and
    latency.
    """

    name: str
    model: nn.Module
    kept: Structure
    images: Mapping[str, Any]
    summary: Mapping[str, Any]


def write_card(folder: Path, subject: Subject) -> None:
    """Write the card of a timm, converted or compacted model, and its picture, into its folder.

    A README.md that somebody else wrote stays. OSError where the folder cannot be written.
    """
    picture = structure_picture(subject.kept, Structure.dense(subject.model))
    write_text(folder / PICTURE, as_file(picture))
    path = folder / CARD
    if path.exists() and MADE not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_text(path, card(subject))


def card(subject: Subject) -> str:
    """The text of the card."""
    name, model, _, found, summary = subject
    licence = found.get("license")
    lines = ["---", "library_name: uvc", f"license: {json.dumps(licence or 'other')}"]
    if getattr(model, "num_classes", 0):
        lines.append("pipeline_tag: image-classification")
    lines += ["tags: [vision-transformer, pruning, uvc]", "---", MADE, "", f"# {_cell(name)}, pruned", ""]
    lines += [f"![what each block keeps]({PICTURE})", ""]
    lines += ["Blue: q/k dims, orange: v dims, green: neurons; grey: removed.", ""]
    lines += ["| | dense | this model | |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in _rows(subject)]
    lines += ["", "## How to load it", "", "```python", "import uvc", ""]
    lines += ['model = uvc.load("path/to/this/folder")  # eval mode; model(images) gives logits', "```", ""]
    lines += ["Images:", ""] if found.keys() - {"label_names", "license"} else []
    lines += [
        f"- {name}: `{json.dumps(value)}`"
        for name, value in found.items()
        if name not in ("label_names", "license")
    ]
    if names := found.get("label_names"):
        more = f" and {len(names) - SHOWN} more, in `config.json`" if len(names) > SHOWN else ""
        lines += ["", f"Classes: {', '.join(map(_cell, names[:SHOWN]))}{more}."]
    said = (
        f"`{licence}`, as timm says of the weights it began with"
        if licence
        else ("not recorded; write the licence of weights and data here before this folder is shared")
    )
    lines += ["", f"Licence: {said}."]
    if versions := summary.get("versions"):
        lines += ["", f"Made with {', '.join(f'{_cell(k)} {_cell(v)}' for k, v in versions.items())}."]
    return "\n".join(lines) + "\n"


def _rows(subject: Subject) -> list[tuple[str, str, str, str]]:
    """What was measured, then what is counted: name, before, now, difference or ratio."""
    _, model, kept, _, summary = subject
    rows = []
    before, after = summary.get("teacher_top1"), summary.get("final_top1")
    if before is not None and after is not None:
        rows.append(
            (f"top-1 on {summary.get('data')} (%)", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
        )
    for metric, name in UNITS.items():
        try:
            was, now = (total(prices(model, metric, s), counts(s)) for s in (Structure.dense(model), kept))
        except ValueError:
            continue  # MACs of a model that has no input size of its own
        rows.append((name, f"{was:,}", f"{now:,}", f"{now / was:.3f}"))
    for entry in summary.get("latency") or ():
        was, now = entry["teacher_ms"], entry["compressed_ms"]
        place = f"latency on {summary.get('device')}, batch {entry['batch']} (ms)"
        rows.append((place, f"{was:.2f}", f"{now:.2f}", f"{now / was:.2f}"))
    return rows


def _cell(value: object) -> str:
    """A text that Markdown takes for no markup of its own."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)

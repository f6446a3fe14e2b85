"""A saved model for a place where it will run: the faster form of each block, measured here."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uvc.app.forms import Choice, choose
from uvc.app.run_dir import COMPACT
from uvc.compaction import compact, equivalent, forms_of
from uvc.costs import cost
from uvc.environment import choose_device, device_name, versions
from uvc.io.card import CARD, PICTURE
from uvc.io.dtypes import check_runs, sample_images
from uvc.io.export import TOLERANCE
from uvc.io.files import make_folder, one_line, write_json
from uvc.io.serialization import CONFIG, WEIGHTS, load, save
from uvc.layers import FORMS, is_compacted

if TYPE_CHECKING:
    from rich.table import Table


def compact_run(
    folder: Path, out: Path | None = None, device: str = "cpu", batch: int = 1, threads: int | None = None
) -> Choice:
    """Choose the forms of the model in `folder` for a device; write it to `out`, by default to `folder`.

    The new model is saved beside, read back and compared with the old one before its files take their places.
    `compact.json` says what was measured. ValueError or RuntimeError, one line each; then nothing changes.
    """
    place = choose_device(device, threads)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {str(out)!r} holds other files; name a new or an empty folder")
    model = load(folder, place)
    if out is None and not is_compacted(model):
        raise ValueError(f"DIR: {str(folder)!r} holds a model in full size, which would be lost; give --out")
    check_runs(model)
    choice = choose(model if is_compacted(model) else compact(model, "auto"), batch)
    target = make_folder(folder, "DIR") if out is None else make_folder(out, "--out")
    with tempfile.TemporaryDirectory(dir=target, prefix=".compact.") as draft:
        save(choice.model, draft)
        images = sample_images(model, 2).to(place)
        error = equivalent(model, load(draft, place), images)
        if not error <= TOLERANCE[images.dtype]:
            raise RuntimeError(f"DIR: outputs in the new form differ by {error:.1e}; nothing was changed")
        try:
            # A card that is there tells of the run; the structure is the same.
            for name in (WEIGHTS, CONFIG, PICTURE, *(() if (target / CARD).exists() else (CARD,))):
                os.replace(Path(draft, name), target / name)
        except OSError as failure:
            raise ValueError(f"{str(target)!r} cannot be written: {one_line(failure)}") from None
    write_json(target / COMPACT, figures(choice, place, batch))
    return choice


def figures(choice: Choice, device: torch.device, batch: int) -> dict[str, Any]:
    """What was measured, for `compact.json`."""
    return {
        "device": device_name(device),
        "batch": batch,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "forms": forms_of(choice.model),
        "blocks": [timed._asdict() for timed in choice.blocks],
        "kept_macs": cost(choice.model).macs,
        "executed_macs": {"before": choice.before_macs, "after": choice.after_macs},
        "ms": {"before": choice.before_ms, "after": choice.after_ms},
        "ratio": choice.ratio,
        "versions": versions(),
    }


def choice_table(choice: Choice) -> "Table":
    """Both forms of each block beside each other, and the whole model before and after."""
    from rich.table import Table

    kept = cost(choice.model).macs
    title = f"{choice.ratio:.3f} of the time; {kept:,} MACs are kept, {choice.after_macs:,} executed"
    table = Table(title=title, min_width=len(title))
    columns = [f"{unit}\n{form}" for form in FORMS for unit in ("MACs", "ms")]
    for name in ("", "form", *columns):
        table.add_column(name, justify="right" if name in columns else "left", no_wrap=True)
    for i, (timed, form) in enumerate(zip(choice.blocks, forms_of(choice.model), strict=True)):
        cells = [(f"{timed.macs[f]:,}", f"{timed.ms[f]:.3f}") if timed.ms else ("", "") for f in FORMS]
        form = form if timed.ms else "the same"
        table.add_row(f"block {i}", form, *(cell for pair in cells for cell in pair))
    table.add_section()
    for name, macs, ms in (
        ("all, before", choice.before_macs, choice.before_ms),
        ("all, now", choice.after_macs, choice.after_ms),
    ):
        table.add_row(name, "", f"{macs:,}", f"{ms:.3f}", "", "")
    return table

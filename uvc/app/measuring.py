"""`uvc latency`: what the parts of a model take on this device, as a table to budget by."""

from pathlib import Path

import timm

from uvc.app.resolve import known_model
from uvc.constraints import check_multiples
from uvc.environment import choose_device
from uvc.io.files import write_text
from uvc.latency_table import LatencyTable, measure
from uvc.training.multiples import settle


def measure_run(
    to: Path,
    model: str,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    round_to: tuple[int, int] | str | None = None,
) -> LatencyTable:
    """Measure the latency table of a timm model and write it to a file; None: one image, multiples of 1.

    round_to: "auto": multiples that are measured first.
    """
    if not to.absolute().parent.is_dir() or to.is_dir():
        raise ValueError(f"FILE: {str(to)!r} cannot be written; name a file in a folder that exists")
    place = choose_device(device, threads)
    made = timm.create_model(known_model(model)).to(place)
    batch = 1 if batch_size is None else batch_size
    multiples = settle(made, batch)[:2] if round_to == "auto" else round_to or (1, 1)
    check_multiples(made, multiples)
    table = measure(made, batch, multiples)
    write_text(to, table.to_json())
    return table

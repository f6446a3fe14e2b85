"""`uvc data DIR`: reads every file of an image folder before a run does, and says what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from uvc.training.folders import FolderReader, split_folder
from uvc.training.images import Unreadable, read_picture

if TYPE_CHECKING:
    from rich.table import Table

AT_A_TIME = 256
PLAIN = {"RGB", "L"}  # modes that need no conversion to be spoken of


class Seen(NamedTuple):
    """One file: its name and class, the digest of its bytes, its mode and size, or why it cannot be read."""

    path: str
    label: int
    digest: bytes
    mode: str
    size: tuple[int, int]
    fault: str | None
    remark: str | None


@dataclass
class Split:
    """What one split holds."""

    name: str
    classes: list[str]
    counts: Counter = field(default_factory=Counter)  # images by label
    modes: Counter = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)  # smallest and largest side
    unused: str = ""


@dataclass
class Checked:
    """The splits, what forbids a run to be trusted (`problems`), and what is only worth knowing (`notes`)."""

    splits: list[Split]
    problems: list[str]
    notes: list[str]


def check_folder(folder: Path, workers: int | None = None) -> Checked:
    """Read all images of both splits; what makes the folder useless as a whole is a problem, too."""
    done = Checked([], [], [])
    readers: dict[str, FolderReader] = {}
    for names in (("train",), ("val", "validation")):
        try:
            own = readers["train"].class_to_idx if "train" in readers else None
            readers[names[0]] = FolderReader(split_folder(folder, *names), own)
        except (OSError, ValueError) as error:
            done.problems.append(str(error).removeprefix("data: "))
    if any(len(reader.class_to_idx) == 1 for reader in readers.values()):
        done.problems.append("there is one class; nothing is to be told apart")
    seen: dict[bytes, list[tuple[str, Seen]]] = {}
    for name, reader in readers.items():
        split = Split(name, list(reader.class_to_idx), unused=str(reader.unused))
        done.splits.append(split)
        faults, remarks = [], {}
        for one in _look_all(reader, workers):
            if one.fault:
                faults.append(one)
                continue
            split.counts[one.label] += 1
            split.modes[one.mode] += 1
            sides = [*split.sizes, *one.size]
            split.sizes = [min(sides), max(sides)]
            if one.remark:
                remarks.setdefault(one.remark, []).append(one)
            seen.setdefault(one.digest, []).append((name, one))
        if faults:
            first = faults[0]
            done.problems.append(
                f"{name}: {len(faults)} of {len(reader)} images cannot be read, "
                f"first {first.path!r} ({first.fault})"
            )
        for remark, found in remarks.items():
            done.notes.append(f"{name}: {len(found)} images {remark}, first {found[0].path!r}")
        if split.unused:
            done.notes.append(f"{name}: not used are {split.unused}")
        odd = {mode: count for mode, count in split.modes.items() if mode not in PLAIN}
        if odd or len(split.modes) > 1:
            listed = ", ".join(f"{count} {mode}" for mode, count in sorted(split.modes.items()))
            done.notes.append(f"{name}: modes are {listed}")
    _compare(list(seen.values()), done)
    return done


def _compare(groups: list[list[tuple[str, Seen]]], done: Checked) -> None:
    """Files of the same bytes: in both splits, or under two classes."""
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    torn = [group for group in groups if len({one.label for _, one in group}) > 1]
    within = sum(len(group) - 1 for group in groups) - len(across)
    for found, what in ((across, "are in train and in val"), (torn, "are in more than one class")):
        if found:
            names = " and ".join(repr(one.path) for _, one in found[0][:2])
            done.problems.append(f"{len(found)} images {what}, byte for byte, first {names}")
    if within > 0:
        done.notes.append(f"{within} files repeat another one of their split")


def _look_all(reader: FolderReader, workers: int | None) -> Iterator[Seen]:
    """Each file once, in order; Pillow's decoders run beside one another in threads."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(reader), AT_A_TIME):
            yield from pool.map(_look, reader.samples[start : start + AT_A_TIME])


def _look(sample: tuple[str, int]) -> Seen:
    path, label = sample
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return Seen(path, label, b"", "", (0, 0), error.strerror or str(error), None)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        picture = read_picture(io.BytesIO(data), "RGB")
        with Image.open(io.BytesIO(data)) as image:
            return Seen(path, label, digest, image.mode, image.size, None, picture.remark)
    except Unreadable as error:
        return Seen(path, label, digest, "", (0, 0), str(error), None)


def data_table(checked: Checked) -> Table:
    """One row per split, and below it the classes with fewest and most images."""
    from rich.table import Table

    table = Table()
    for name in (
        "split",
        "images",
        "classes",
        "fewest of a class",
        "most of a class",
        "sides (pixels)",
        "modes",
    ):
        table.add_column(name, justify="left" if name in ("split", "modes") else "right")
    for split in checked.splits:
        by_class = [(split.counts[label], name) for label, name in enumerate(split.classes)]
        ends = (f"{count} {name}" for count, name in (min(by_class), max(by_class)))
        sides = " to ".join(map(str, split.sizes))
        total = str(split.counts.total())
        table.add_row(split.name, total, str(len(split.classes)), *ends, sides, " ".join(sorted(split.modes)))
    return table

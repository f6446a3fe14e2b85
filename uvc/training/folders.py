"""Image folders: a split holds one folder per class, and in it images at any depth. What is not used is
counted and said.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from uvc.training.images import endings

USAGE = (
    "use 'digits', a folder with train/ and val/ full of class folders, or a timm name such as torch/cifar10"
)
# What file systems and archives leave beside pictures.
LEFT_BEHIND = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}


@dataclass
class Unused:
    """Files that are not used, by reason: how many, and the first of them."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, path: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, path))
        self.found[reason] = (before + count, first)

    def __str__(self) -> str:
        parts = (f"{count} {reason}, first {first!r}" for reason, (count, first) in self.found.items())
        return "; ".join(parts)


class FolderReader(Reader):
    """The images of one split, as timm's readers give them: an open file and the number of its class.

    timm's own reader of folders names a class by an image's nearest folder and knows fewer kinds of files.
    """

    def __init__(self, root: Path, class_to_idx: dict[str, int] | None = None) -> None:
        """class_to_idx: of the split that was trained on; None: numbered in the order of their names.

        ValueError for a split without classes, with other ones, or with an empty one.
        """
        super().__init__()
        self.root, self.unused = root, Unused()
        self.class_to_idx = class_to_idx or {}
        self.samples: list[tuple[str, int]] = []
        classes = []
        for entry in sorted(os.scandir(root), key=lambda e: e.name):
            if _left_behind(entry.name):
                self.unused.add("hidden files or folders", entry.path)
            elif entry.is_dir():
                classes.append(entry.name)
            else:
                self.unused.add("files outside the class folders", entry.path)
        if not classes:
            raise ValueError(f"data: {str(root)!r} holds no class folders; {USAGE}")
        if class_to_idx is not None and class_to_idx.keys() != set(classes):
            odd = sorted(class_to_idx.keys() ^ set(classes))[0]
            where = "only" if odd in classes else "not"
            raise ValueError(
                f"data: {str(root)!r}: the splits differ in their classes: {odd!r} is {where} in {root.name}/"
            )
        self.class_to_idx = class_to_idx or {name: i for i, name in enumerate(classes)}
        known = endings()
        for name in classes:
            label, before, unused = self.class_to_idx[name], len(self.samples), Unused()
            for path in _files(root / name, unused):
                ending = os.path.splitext(path)[1].lower()
                if ending in known:
                    self.samples.append((path, label))
                else:
                    unused.add(f"files ending in {ending!r}" if ending else "files without an ending", path)
            if len(self.samples) == before:
                raise ValueError(
                    f"data: class folder {str(root / name)!r} holds no images; fill or remove it"
                    + (f" (it holds {unused})" if unused.found else "")
                )
            for reason, (count, first) in unused.found.items():
                self.unused.add(reason, first, count)
        self.samples.sort(key=lambda sample: natural_key(sample[0]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def split_folder(folder: Path, *names: str) -> Path:
    """The first of the sub-folders that is there; ValueError if none is."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"data: {str(folder)!r} has no folder {' or '.join(names)}/; {USAGE}")


def open_folder(folder: Path) -> tuple[FolderReader, FolderReader]:
    """The training and the validation split of an image folder; ValueError when one is not whole."""
    train = FolderReader(split_folder(folder, "train"))
    return train, FolderReader(split_folder(folder, "val", "validation"), train.class_to_idx)


def _left_behind(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BEHIND


def _files(folder: Path, unused: Unused) -> Iterator[str]:
    """Paths of the files under a folder, links followed, each real folder once on its way down."""
    above = {}
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        above[at] = {*above.get(os.path.dirname(at), ()), real}
        for name in [name for name in folders if _left_behind(name)]:
            unused.add("hidden files or folders", os.path.join(at, name))
            folders.remove(name)
        # A link to a folder above itself would be walked through for ever.
        folders[:] = sorted(n for n in folders if os.path.realpath(os.path.join(at, n)) not in above[at])
        for name in sorted(files):
            if _left_behind(name):
                unused.add("hidden files or folders", os.path.join(at, name))
            else:
                yield os.path.join(at, name)

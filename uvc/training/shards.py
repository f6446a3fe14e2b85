"""WebDataset shards in random order: timm's reader says which files make a split, here each image is found in
them by its place, so that views, orders and resumed runs are those of any other data.
"""

from __future__ import annotations

import io
import os
import tarfile
from typing import IO, Any

from timm.data.readers.reader import Reader

from uvc.training.images import endings


class ShardReader(Reader):
    """Reads `key.jpg` (or another image) and `key.cls` (its class as a number) of uncompressed tar files."""

    def __init__(self, shards: Any) -> None:
        """shards: timm's ``ReaderWds``. ValueError for a broken shard, or images without classes."""
        super().__init__()
        self.root = shards.root
        self.samples: list[tuple[str, int, int, str, int]] = []  # file, offset, bytes, name, class
        for name in shards.split_info.filenames:
            self._index(os.path.join(self.root, name))
        labels = {label for *_, label in self.samples}
        names = range(max(labels, default=-1) + 1)
        self.class_to_idx = {str(label): label for label in names}

    def _index(self, path: str) -> None:
        known, labels, images = endings(), {}, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, base = os.path.split(member.name)
                    key, _, ending = base.partition(".")
                    key = os.path.join(folder, key)
                    if ending == "cls":
                        labels[key] = int(tar.extractfile(member).read())
                    elif f".{ending.lower()}" in known and member.isfile():
                        images[key] = (member.offset_data, member.size, member.name)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"data: shard {path!r} cannot be read: {error}") from None
        for key, (offset, size, name) in images.items():
            if key not in labels:
                raise ValueError(f"data: shard {path!r}: {name} has no {key}.cls, the number of its class")
            self.samples.append((path, offset, size, name, labels[key]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, offset, size, _, label = self.samples[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path, _, _, name, _ = self.samples[index]
        return os.path.basename(name) if basename else f"{path}:{name}"

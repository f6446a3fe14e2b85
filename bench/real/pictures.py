"""Image folders of emoji: nine categories, two vendors, pictures of 64 pixels on white.

An emoji is held out with both vendors' pictures. Emoji with a picture in common (islands that fly the flag of
their country, for one) stay together, so no held-out picture is a training picture.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

HELD_OUT = 0.25
NO_CLASS = "Component"  # skin tones
Emoji = dict[str, Image.Image]  # picture by vendor


def read(packages: dict[str, Path]) -> dict[str, dict[str, Emoji]]:
    """Every base emoji, {category: {name: {vendor: picture}}}, from the vendors' packages."""
    found = defaultdict(lambda: defaultdict(dict))
    for vendor, file in packages.items():
        with tarfile.open(file) as archive:
            names = {member.name: member for member in archive}
            for emoji in json.load(archive.extractfile(names["package/emoji.json"])):
                name, category = emoji["image"], emoji["category"]
                if category != NO_CLASS and emoji[f"has_img_{vendor}"]:
                    member = names[f"package/img/{vendor}/64/{name}"]
                    slug = re.sub(r"\W+", "-", category.lower())
                    found[slug][Path(name).stem][vendor] = on_white(archive.extractfile(member).read())
    return {category: dict(emojis) for category, emojis in found.items()}


def on_white(png: bytes) -> Image.Image:
    """An RGB picture: what is transparent shows white."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def groups(emojis: dict[str, Emoji]) -> list[list[str]]:
    """Names, those of emoji with a picture in common together."""
    found: list[tuple[set, set]] = []  # (names, pictures)
    for name, pictures in sorted(emojis.items()):
        names, seen = {name}, {(vendor, picture.tobytes()) for vendor, picture in pictures.items()}
        for other in [group for group in found if group[1] & seen]:
            found.remove(other)
            names, seen = names | other[0], seen | other[1]
        found.append((names, seen))
    return [sorted(names) for names, _ in found]


def split(emojis: dict[str, Emoji], seed: int) -> tuple[dict[str, Emoji], dict[str, Emoji]]:
    """(training, held out): of the emoji of one category a quarter, drawn at random, is held out."""
    order = groups(emojis)
    random.Random(seed).shuffle(order)
    wanted, held = round(HELD_OUT * len(emojis)), set()
    for group in order:
        if len(held) + len(group) <= wanted:
            held.update(group)
    return (
        {name: pictures for name, pictures in emojis.items() if name not in held},
        {name: pictures for name, pictures in emojis.items() if name in held},
    )


def write(categories: dict[str, dict[str, Emoji]], test: Path, tune: Path) -> None:
    """Two image folders, train/ and val/ in each: `test` holds a quarter out, and `tune`, for choosing
    settings, a quarter of what `test` trains on.
    """
    parts = {folder: folder.with_name(folder.name + ".part") for folder in (test, tune)}
    for part in parts.values():
        shutil.rmtree(part, ignore_errors=True)
    for category, emojis in categories.items():
        train, val = split(emojis, seed=0)
        for folder, pair in ((test, (train, val)), (tune, split(train, seed=1))):
            for name, chosen in zip(("train", "val"), pair, strict=True):
                _save(chosen, parts[folder] / name / category)
    for folder, part in parts.items():
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def _save(emojis: dict[str, Emoji], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, pictures in emojis.items():
        for vendor, picture in pictures.items():
            picture.save(folder / f"{name}_{vendor}.png")


def count(folder: Path, parts: Sequence[str] = ("train", "val")) -> tuple[int, ...]:
    """Pictures in each part of an image folder."""
    return tuple(sum(1 for _ in (folder / part).glob("*/*.png")) for part in parts)

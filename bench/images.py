"""bench/results/DEVICE/input/images.csv: how many training images a core decodes and prepares per second.

JPEG files of 500 x 375 pixels, ImageNet's usual size, are drawn here and read by the loaders of a run, as a
model of 224 pixels takes them. The clock is the processor's, so that what else runs counts little.

python bench/images.py [--images 256] [--rounds 3]
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from uvc.config import DataConfig
from uvc.environment import commit, processor, slug, versions_line
from uvc.training.data import load_data

ROOT = Path(__file__).resolve().parents[1]
VIEWS = {"plain": DataConfig(), "rand-m9": DataConfig(aa="rand-m9-mstd0.5", reprob=0.25)}
FIELDS = ("date", "views", "images", "kbyte", "images_per_s", "slowest", "device", "commit", "versions")


def draw(folder: Path, images: int) -> float:
    """Writes a folder of smooth images with noise on them; returns their mean size in KB."""
    chance, sizes = np.random.default_rng(0), []
    for split, count in (("train", images), ("val", 2)):
        for i in range(count):
            coarse = Image.fromarray(chance.integers(0, 256, (47, 63, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = smooth + chance.integers(-24, 25, smooth.shape)
            file = folder / split / "ab"[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
            sizes.append(file.stat().st_size)
    return sum(sizes) / len(sizes) / 1e3


def rates(folder: Path, views: DataConfig, rounds: int) -> list[float]:
    """Images per second of processor time, in each of some epochs after the first."""
    wants = timm.get_pretrained_cfg("deit_base_patch16_224").to_dict()
    train = load_data(folder, model_input=wants, batch_size=32, views=views).train
    found = []
    for _ in range(rounds + 1):
        start, seen = time.process_time(), 0
        for images, _ in train:
            seen += len(images)
        found.append(seen / (time.process_time() - start))
    return found[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Appends a row for each kind of views."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kbyte = draw(Path(folder), options.images)
        measured = {name: rates(Path(folder), views, options.rounds) for name, views in VIEWS.items()}
    file = options.results / slug(processor()) / "input" / "images.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with open(file, "a", newline="") as opened:
        writer = csv.writer(opened)
        if new:
            writer.writerow(FIELDS)
        for name, found in measured.items():
            row = (date.today(), name, options.images, f"{kbyte:.1f}", f"{np.median(found):.4g}")
            writer.writerow((*row, f"{min(found):.4g}", processor(), commit(), versions_line()))
            print(f"{name}: {np.median(found):.0f} images/s of one core, {kbyte:.0f} KB each")
    return 0


if __name__ == "__main__":
    sys.exit(main())

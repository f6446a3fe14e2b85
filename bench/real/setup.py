"""What all rows share: the user's folder, the model, and one setting for all arms, budgets and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import timm
from torch import nn

from bench.real.weights import MODEL
from uvc.config import Config, DataConfig
from uvc.training.data import Data, load_data

# On `tune`, a part of the training pictures, seed 0, the linear classifier has 70.2 (68.8 with PROBE_C 0.1);
# fine-tuned at 1e-4 on crops of 0.08 to 1, 64.8 after three epochs; at 5e-5, 62.0 after the first of three
# epochs on such crops, and 70.0 on crops of 0.6 to 1. Search and post-training: docs/real.md.
CONFIG = Config(
    teacher_epochs=3,
    warmup_epochs=0,
    search_epochs=3,
    post_epochs=3,
    batch_size=32,
    learning_rate=5e-5,
    search_learning_rate=5e-5,
    precision="bfloat16",
    threads=1,
)
TEACHER_RATE = 5e-5
# Changed when a row would come out different. Reports and resuming look at the latest rows and runs only.
VERSION = 1
VIEWS = DataConfig(scale=(0.6, 1.0))


@dataclass(frozen=True)
class Setup:
    """folder: the user's, for packages, weights, pictures, teachers and runs; nothing of it is committed.

    part: "emoji", or "tune" for choosing settings. teacher_rate: learning rate of the teacher.
    """

    folder: Path
    part: str = "emoji"
    config: Config = CONFIG
    views: DataConfig = VIEWS
    teacher_rate: float = TEACHER_RATE
    model: str = MODEL
    size: int = 84

    @property
    def weights(self) -> Path:
        """The pretrained ones."""
        return self.folder / "dinov2.safetensors"

    @property
    def data(self) -> Path:
        """The image folder."""
        return self.folder / self.part

    def answers(self, seed: int) -> Path:
        """Where the answers of a seed's teacher lie, which all its arms and budgets share."""
        return self.folder / "answers" / f"{self.part}-{seed}-{self.teacher_rate:g}"

    def seeded(self, seed: int) -> Config:
        """The settings with a seed."""
        return replace(self.config, seed=seed)

    def build(self, classes: int) -> nn.Module:
        """The dense model, untrained."""
        return timm.create_model(self.model, img_size=self.size, num_classes=classes)

    def loaders(self, seed: int) -> Data:
        """Loaders as the command line makes them."""
        view = {**timm.get_pretrained_cfg(self.model).to_dict(), "input_size": (3, self.size, self.size)}
        batch = self.config.batch_size
        return load_data(self.data, model_input=view, batch_size=batch, seed=seed, views=self.views)

"""Named recipes: functions that return a whole config."""

from __future__ import annotations

from collections.abc import Callable

from uvc.config import Config


def default() -> Config:
    """The paper's schedule: 5 warm-up, 25 search and 120 post-training epochs."""
    return Config()


def digits() -> Config:
    """Handwritten digits with the small 8x8 ViT: minutes on a laptop CPU. Settings were chosen on
    `validation="val"`.
    """
    return Config(
        teacher_epochs=40,
        warmup_epochs=1,
        search_epochs=20,
        post_epochs=20,
        batch_size=64,
        learning_rate=2e-3,
        search_learning_rate=1e-3,
        lr_warmup_fraction=0.1,
        threads=1,  # its products are so small that a second thread costs more than it gives
    )


RECIPES: dict[str, Callable[[], Config]] = {"default": default, "digits": digits}

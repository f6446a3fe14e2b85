"""A run that is interrupted goes on where it was: the same call with resume=True."""

import tempfile

from digits_task import loaders, trained_vit

import uvc
from uvc.config import Config

config = Config(
    warmup_epochs=1, search_epochs=4, post_epochs=2, learning_rate=1e-3, search_learning_rate=1e-3
)


class Interrupted(Exception):
    """What takes the place of a power cut here."""


def interrupt(loader, after):
    """The loader, which fails in one of its passes."""
    collate, left = loader.collate_fn, [after * len(loader)]

    def counted(rows):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return collate(rows)

    loader.collate_fn = counted
    return loader


with tempfile.TemporaryDirectory() as folder:
    train, val = loaders()
    model = trained_vit(train, epochs=4)
    try:
        uvc.compress(model, interrupt(train, after=3), val, budget=0.5, config=config, out=folder)
    except Interrupted:
        print("interrupted in the search")
    train, val = loaders()
    model = trained_vit(train, epochs=4)
    result = uvc.compress(model, train, val, budget=0.5, config=config, out=folder, resume=True)
    small = uvc.load(folder)
share = uvc.cost(small).macs / result.dense_cost.macs
print(f"finished after {result.steps} steps with {share:.4f} of the MACs")

"""A run of 12 steps that is stopped or killed at one of them, and continued: for `gang`, and quick."""

import dataclasses
import os
import signal
import threading

from test_compress import CONFIG, digits_model

from uvc.training.checkpoint import Checkpoints
from uvc.training.compress import compress
from uvc.training.data import load_data
from uvc.training.signals import Stopped, stop_on_signals
from uvc.training.trainer import Trainer

# 6 steps in an epoch.
QUICK = dataclasses.replace(CONFIG, warmup_epochs=0, search_epochs=1, post_epochs=1, checkpoint_every=2)


def run(out, changes, number=None, at=None, rank=1):
    """Begins or continues a run in `out`; the process of a rank gets a signal before the step `at`.

    What is left: weights and structure, or what it said as it stopped.
    """
    train_step = Trainer._train_step

    def watched(self, *rest):
        if self.steps == at and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return train_step(self, *rest)

    Trainer._train_step = watched
    data = load_data("digits", model_input=(1, 8, 8), batch_size=160, validation="val")
    config = dataclasses.replace(QUICK, **changes)
    try:
        with stop_on_signals():
            result = compress(digits_model(), data.train, data.val, 0.6, config=config, out=out, resume=True)
    except (Stopped, ConnectionError) as ended:
        return str(ended)
    finally:
        Trainer._train_step = train_step
    return {name: t.numpy() for name, t in result.model.state_dict().items()}, result.structure


def killed(out, changes, rank, writing, after):
    """As `run`; the process of a rank is killed so many seconds after its first step begins, or, `writing`,
    after it begins to write its first checkpoint.
    """
    kind, name = (Checkpoints, "_write") if writing else (Trainer, "_train_step")
    if writing and changes.get("fsdp"):
        from uvc.training.fsdp.checkpoint import SpreadCheckpoints

        kind, name = SpreadCheckpoints, "_write_parts"
    work, begun = getattr(kind, name), []

    def watched(self, *rest):
        if os.environ["RANK"] == str(rank) and not begun:
            begun.append(threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)))
            begun[0].daemon = True
            begun[0].start()
        return work(self, *rest)

    setattr(kind, name, watched)
    return run(out, changes)

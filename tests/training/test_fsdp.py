"""Processes that hold a part of the model each (FSDP2) train as one process with all of it."""

import dataclasses
import re
import shutil
import signal
import time

import pytest
from gang import gang
from short_runs import run
from test_checkpoints import spoil
from test_compress import digits_model
from test_processes import REACH, SHORT, digits, farthest, meddle, search

from uvc.config import SolverConfig
from uvc.training.compress import compress


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "grad_checkpointing": True}], ids=["plain", "parts"]
)
def test_spread_processes_have_the_structures_of_one_process_in_every_step(changes):
    (alone,), ranks = gang(1, search, changes), gang(2, search, {"fsdp": True, **changes})
    assert not [rank for rank in ranks if isinstance(rank, BaseException)], ranks
    assert ranks[0][0] == ranks[1][0] == alone[0] and len(alone[0]) == 60
    assert farthest(ranks[0][1], ranks[1][1]) == 0 and ranks[0][2:] == ranks[1][2:]
    print(f"farthest weight {farthest(ranks[0][1], alone[1]):.1e}")
    assert farthest(ranks[0][1], alone[1]) < 0.05 * REACH
    assert ranks[0][2] == alone[2] and ranks[0][3] == alone[3]


SPREAD = {"fsdp": True}


@pytest.mark.timeout(900)
def test_a_spread_run_goes_on_to_the_bit_and_in_one_process(tmp_path):
    whole = gang(2, run, tmp_path / "whole", SPREAD)
    out = tmp_path / "out"
    said = gang(2, run, out, SPREAD, signal.SIGUSR1, 5)
    assert said[0] == said[1] and "stopped in search, epoch 0, after 6 of 6 batches" in said[0]
    parts = sorted(out.glob("checkpoint-parts/*/shard-*.safetensors"))
    assert len(parts) == 4 and len({part.parent for part in parts}) == 2  # of two processes, the last two
    shutil.copytree(out, tmp_path / "one")
    ranks = gang(2, run, out, SPREAD)
    assert farthest(ranks[0][0], whole[0][0]) == farthest(ranks[1][0], whole[0][0]) == 0
    assert ranks[0][1] == ranks[1][1] == whole[0][1]
    (alone,) = gang(1, run, tmp_path / "one", {})
    assert alone[1] == whole[0][1] and farthest(alone[0], whole[0][0]) < 0.05 * REACH


@pytest.mark.timeout(900)
def test_a_run_of_one_process_goes_on_spread_over_two_and_a_damaged_part_is_not_taken(tmp_path):
    out = tmp_path / "out"
    (said,) = gang(1, run, out, {}, signal.SIGUSR1, 1, 0)
    assert said.startswith("stopped in search, epoch 0, after 2 of 6")
    shutil.copytree(out, tmp_path / "whole")
    whole = gang(2, run, tmp_path / "whole", SPREAD)
    (alone,) = gang(1, run, tmp_path / "one", {})
    assert alone[1] == whole[0][1] and farthest(alone[0], whole[0][0]) < 0.05 * REACH
    assert gang(2, run, out, SPREAD, signal.SIGUSR1, 5)[0].startswith("stopped")
    newest = max((out / "checkpoint-parts").iterdir(), key=lambda folder: int(folder.name))
    spoil(newest / "shard-00002-model-00001-of-00001.safetensors")
    ranks = gang(2, run, out, SPREAD)
    assert ranks[0][1] == whole[0][1] and farthest(ranks[0][0], whole[0][0]) == 0


@pytest.mark.timeout(900)
def test_when_a_rank_of_a_spread_run_is_killed_the_other_ends_in_one_line_and_the_run_goes_on(tmp_path):
    whole, out = gang(2, run, tmp_path / "whole", SPREAD), tmp_path / "out"
    start = time.monotonic()
    line, killed = gang(2, run, out, SPREAD, signal.SIGKILL, 3)
    assert killed is None and "\n" not in line and "process 0 of 2 has lost another one" in line
    assert time.monotonic() - start < 60
    ranks = gang(2, run, out, SPREAD)
    assert ranks[0][1] == whole[0][1] and farthest(ranks[0][0], whole[0][0]) == 0


@pytest.mark.parametrize("field", ["structure", "z"])
def test_a_spread_rank_that_differs_is_caught_at_that_step(field):
    for found in gang(2, meddle, field, {"fsdp": True}):
        assert isinstance(found, RuntimeError) and str(found).startswith(
            f"search: epoch 1, batch 0: the 2 processes differ in {field};"
        )


@pytest.mark.parametrize(
    ("changes", "budget", "says"),
    [
        ({"ema_decay": 0.9}, 0.5, "ema_decay: 0.9, but with fsdp no process has whole weights"),
        ({"solver": SolverConfig(method="published")}, 0.5, "solver method: 'published', but with fsdp"),
        ({"solver": SolverConfig(tokens=1)}, 0.5, "solver tokens: 1, but with fsdp"),
        ({}, (0.7, 0.5), "budget: 2 of them, but with fsdp"),
    ],
)
def test_what_reads_whole_weights_is_refused(changes, budget, says):
    data = digits()
    with pytest.raises(ValueError, match=re.escape(says)):
        config = dataclasses.replace(SHORT, fsdp=True, **changes)
        compress(digits_model(), data.train, data.val, budget, config=config)

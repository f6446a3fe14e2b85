"""Processes that hold a part of the model each (FSDP2) train as one process with all of it."""

import dataclasses
import re
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from gang import gang
from short_runs import run
from test_checkpoints import spoil
from test_compress import digits_model
from test_processes import REACH, SHORT, digits, farthest, meddle, search
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from uvc.config import SolverConfig
from uvc.costs import cost
from uvc.layers import convert
from uvc.solver.rows import whole
from uvc.structure import Structure, apply_structure
from uvc.training import checkpoint
from uvc.training.compress import compress
from uvc.training.processes import Several


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


class Bytes(TorchDispatchMode):
    """Counts what a process hands over or gets in collectives."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if torch.is_tensor(t)]
            self.of[func._overloadpacket.__name__] += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def traffic():
    """Of some structures what is kept of the parameters, what is gathered and what is scattered of their
    bytes, and how far gradients are from those of a model that is whole, relative to their norm.
    """
    torch.manual_seed(0)
    processes, model = Several(cpu=True), convert(digits_model(embed_dim=64, depth=3, num_heads=4))
    torch.nn.init.normal_(model.head.weight)
    twin, dense, images = processes.spread(model), 4 * cost(model).params, torch.randn(8, 1, 8, 8)
    reduction, found = processes.reduction(twin), []
    for structure in (
        Structure.dense(model),
        Structure.random(model, keep=0.5, seed=0),
        Structure.random(model, keep=0.25, seed=0),
        Structure.uniform(model, heads=0.5, neurons=0.5),
        Structure.uniform(model, blocks=0.67),
    ):
        for each in (model, twin):
            apply_structure(each, structure)
            each.zero_grad()
        with reduction.guard(), Bytes() as counted:
            twin(images).square().mean().backward()
        model(images).square().mean().backward()
        whole_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        far = [
            (whole(twin.get_parameter(name).grad) - p.grad).norm()
            for name, p in model.named_parameters()
            if p.grad is not None
        ]
        kept, sent = 4 * cost(model).params / dense, {name: size / dense for name, size in counted.of.items()}
        found.append((kept, sent, float(torch.stack(far).norm() / whole_norm)))
    return found


@pytest.mark.parametrize("count", [2, 3], ids=["columns", "three do not divide them"])
def test_what_is_sent_follows_the_structure(count):
    found, *others = gang(count, traffic)
    assert all(other == found for other in others)
    for kept, sent, far in found:
        gathered, scattered = sorted(sent.values(), reverse=True)
        print(f"{kept:.3f} of the parameters, {gathered:.3f} gathered, {scattered:.3f} scattered")
        assert far < 1e-5
    for kept, sent, _ in found:
        # By rows processes have lost unequally many, and all send as many as the one that has most.
        most = 1.05 if count == 2 else 2
        assert 1 <= sent["_allgather_base_"] / (2 * kept) < most
        assert 1 <= sent["_reduce_scatter_base_"] / kept < most


def of_other_blocks(block):
    """How far gradients of a spread model of such blocks are from those of one that is whole."""
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=5)
    model = convert(VisionTransformer(**sizes, block_fn=block))
    torch.nn.init.normal_(model.head.weight)
    processes, images, far = Several(cpu=True), torch.randn(4, 3, 16, 16), []
    twin = processes.spread(model)
    reduction = processes.reduction(twin)
    for structure in (
        Structure.dense(model),
        Structure.random(model, 0.5),
        Structure.uniform(model, blocks=0.5),
    ):
        for each in (model, twin):
            apply_structure(each, structure)
            each.zero_grad()
        with reduction.guard():
            twin(images).square().mean().backward()
        model(images).square().mean().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                far.append(
                    float((whole(twin.get_parameter(name).grad) - p.grad).norm() / (1e-3 + p.grad.norm()))
                )
    return max(far)


@pytest.mark.parametrize("block", [ParallelThingsBlock, DiffParallelScalingBlock])
def test_blocks_whose_halves_are_elsewhere_are_spread_as_one(block):
    assert max(gang(2, of_other_blocks, block)) < 1e-4


def on_a_small_disk(folder):
    """What a process says that is to write its half of the weights where two thirds of them fit."""
    processes, model = Several(cpu=True), convert(digits_model())
    twin, free = processes.spread(model), 2 * sum(p.nbytes for p in model.parameters()) // 3
    checkpoint._free = lambda folder: free
    processes.wait()  # the first to fail would end while the other still looks for it
    try:
        processes.checkpoints(folder / "checkpoint.safetensors", twin).save(
            {"model": twin.state_dict()}, {"steps": 1}
        )
    except OSError as error:
        return str(error)


def test_the_disk_must_hold_the_parts_of_all_processes(tmp_path):
    for said in gang(2, on_a_small_disk, tmp_path):
        assert "checkpoint.safetensors cannot be written: 0." in said


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
            f"search: epoch 0, batch 5: the 2 processes differ in {field};"
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

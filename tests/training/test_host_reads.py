"""How often a step of training makes the host wait: a tensor of the device is read, or copied to the CPU."""

import copy
import traceback
from typing import ClassVar

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import uvc
from uvc.config import Config, SolverConfig
from uvc.layers import children
from uvc.training.trainer import Trainer


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU; what follows from it is one, too, until it is copied to the CPU."""

    reads: ClassVar[list[str]] = []


def _counted(name):
    plain = getattr(torch.Tensor, name)

    def read(self, *args, **kwargs):
        called = traceback.extract_stack(limit=2)[0]
        OnDevice.reads.append(f"{name} {called.filename.rpartition('/')[2]}:{called.lineno}")
        return plain(self.as_subclass(torch.Tensor), *args, **kwargs)

    return read


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")
for name in READS:
    setattr(OnDevice, name, _counted(name))


def _moved(self, *args, **kwargs):
    if any(str(arg) == "cpu" for arg in (*args, *kwargs.values())):
        return self.cpu()
    return torch.Tensor.to(self, *args, **kwargs)


OnDevice.to = _moved


def reads_by_step(monkeypatch, steps, **solver):
    """Of each step of a search on `OnDevice` weights: number, reads, whether it changes the structure, and
    whether gates are hard.
    """
    monkeypatch.setattr(children, "WEIGHTS", (*children.WEIGHTS, OnDevice))
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=10
    )
    teacher, model = copy.deepcopy(model), uvc.convert(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().as_subclass(OnDevice)))
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    found = []
    step = Trainer._train_step

    def watched(self, task, batch, optimizer, pruner, check):
        # On a GPU this is not read before the log is written.
        monkeypatch.setattr(check, "read", lambda images=None: None)
        before = uvc.structure_of(self.model)
        OnDevice.reads.clear()
        out = step(self, task, batch, optimizer, pruner, check)
        reads = list(OnDevice.reads)
        if type(pruner).__name__ == "Search":
            found.append((pruner.count - 1, reads, uvc.structure_of(self.model) != before, pruner.state.hard))
        return out

    monkeypatch.setattr(Trainer, "_train_step", watched)
    config = Config(
        teacher_epochs=0,
        warmup_epochs=0,
        search_epochs=steps // 2,
        post_epochs=0,
        solver=SolverConfig(**solver),
    )
    uvc.compress(model, loader, loader, budget=0.6, config=config, teacher=teacher)
    return found


def test_what_stands_for_a_device_is_kept_and_counted():
    OnDevice.reads.clear()
    x = torch.nn.Parameter(torch.ones(3).as_subclass(OnDevice))
    y = (2 * x).sum()
    assert isinstance(y, OnDevice) and isinstance(x.detach(), OnDevice)
    assert float(y) == 6.0 and bool(y > 0) and y.to("cpu").item() == 6.0 and x.detach().tolist() == [1.0] * 3
    assert [read.split()[0] for read in OnDevice.reads] == ["__float__", "__bool__", "cpu", "tolist"]


@pytest.mark.parametrize("skip", ["halves", "none"])
def test_a_step_that_changes_nothing_never_waits_and_a_solver_step_reads_once(monkeypatch, skip):
    steps = reads_by_step(monkeypatch, 60, skip=skip)
    assert len(steps) == 60 and any(hard for *_, hard in steps)
    between = [reads for count, reads, *_ in steps if count % 2]
    assert between and not any(between), between
    # every second step scores and norms come in one copy, and every fourth what gates have seen with them
    for count, reads, changed, _ in steps:
        if not changed and not count % 2:
            assert len(reads) == 1 and reads[0].startswith("cpu "), (count, reads)

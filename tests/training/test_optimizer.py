"""The optimiser that passes over pruned rows: the numbers, state and checkpoints of torch's fused AdamW."""

import copy

import pytest
import timm
import torch
from uvc_kernels import adamw as op
from uvc_kernels.adamw import AT_REST

import uvc
from uvc.training import optimizer as module
from uvc.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from uvc.training.optimizer import AdamW


def small(cleared=True):
    """A small ViT, half pruned, with what is pruned set to zero, as the search leaves it."""
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = uvc.convert(timm.create_model("vit_tiny_patch16_224", **size))
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5))
    if cleared:
        with torch.no_grad():
            for block in model.blocks:
                for half in (block.attn, block.mlp):
                    for weight, removed in half.removed_rows().items():
                        weight[removed] = 0.0
    return model


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(2, 3, 32, 32, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def of_torch(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)


def of_ours(model):
    return AdamW(model.parameters(), model, lr=1e-3, weight_decay=0.05)


def assert_same(a, optimizer_a, b, optimizer_b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer_a.state[p].keys() == optimizer_b.state[q].keys()
        for key, value in optimizer_a.state[p].items():
            assert torch.equal(value, optimizer_b.state[q][key]), key


@pytest.mark.parametrize("cleared", [True, False])
def test_steps_are_those_of_torch_to_the_last_bit(cleared, monkeypatch):
    ours, torchs = small(cleared), small(cleared)
    optimizers, calls = (of_ours(ours), of_torch(torchs)), []
    monkeypatch.setattr(module.uvc_kernels, "adamw", lambda *lists: calls.append(lists) or op(*lists))
    for model, optimizer in zip((ours, torchs), optimizers, strict=True):
        train(model, optimizer, 3)
        # another structure in between: what comes back to life is stepped
        uvc.apply_structure(model, uvc.Structure.random(model, 0.7, seed=1))
        train(model, optimizer, 3)
    assert_same(ours, optimizers[0], torchs, optimizers[1])
    # torch makes the averages in the first step; from then on two weights of each block go to the op
    assert [len(lists[0]) for lists in calls] == [4] * 5
    if cleared:
        assert any((rows == AT_REST).any() for lists in calls for rows in lists[4])


@pytest.mark.parametrize("first", [of_ours, of_torch])
@pytest.mark.parametrize("then", [of_ours, of_torch])
def test_a_checkpoint_of_one_goes_on_with_the_other(first, then):
    model, straight = small(), small()
    optimizer, reference = first(model), of_torch(straight)
    train(model, optimizer, 2)
    saved = optimizer_tensors(optimizer, model)
    resumed = then(model)
    load_optimizer_tensors(resumed, model, {name: t.clone() for name, t in saved.items()})
    train(model, resumed, 2, seed=1)
    train(straight, reference, 2)
    train(straight, reference, 2, seed=1)
    assert_same(model, resumed, straight, reference)


def test_what_the_op_does_not_serve_is_torchs(monkeypatch):
    monkeypatch.setattr(module.uvc_kernels, "adamw", lambda *lists: pytest.fail("not for these"))
    for change in ({"amsgrad": True}, {"lr": torch.tensor(1e-3)}):
        model, other = small(), small()
        options = {"lr": 1e-3, "weight_decay": 0.05, **change}
        ours, torchs = AdamW(model.parameters(), model, **options), None
        torchs = torch.optim.AdamW(other.parameters(), fused=True, **options)
        train(model, ours, 3)
        train(other, torchs, 3)
        assert_same(model, ours, other, torchs)
    dense = uvc.convert(copy.deepcopy(small()))
    uvc.apply_structure(dense, uvc.Structure.dense(dense))
    train(dense, of_ours(dense), 2)


def test_hooks_and_closures_run_once(monkeypatch):
    model, seen = small(), []
    optimizer = of_ours(model)
    of_torch(small())  # torch wraps the step of a class when it first makes one
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        loss = model(torch.ones(1, 3, 32, 32)).square().mean()
        loss.backward()
        seen.append("closure")
        return loss

    assert optimizer.step(closure) > 0 and seen == ["pre", "closure", "post"]

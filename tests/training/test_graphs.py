"""Steps from a graph: equal to plain ones bit by bit, captured anew when the structure changes.

There is no GPU: what stands for a CUDA graph records the ops of a step below autograd and runs them again on
the same memory, as a graph does; no Python of the step runs again, and reading a tensor back is an error.
"""

import copy
import warnings
from contextlib import contextmanager

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import uvc
from uvc.config import Config, DistillConfig
from uvc.training.graphs import Captured, CapturedUpdate
from uvc.training.losses import Classification, Distillation

READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in READS:
            raise RuntimeError(f"{func.name()} in a capture\nand more")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorded:
    """Stands for a CUDA graph."""

    made = 0

    def __init__(self):
        Recorded.made += 1

    @contextmanager
    def recording(self):
        with Recorder() as recorder:
            yield
        self.calls = recorder.calls

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, recorded in self.calls:
            found = func(*args, **kwargs)
            for place, value in zip(tree_leaves(recorded), tree_leaves(found), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.detach().copy_(value)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setenv("UVC_MEASURE", "0")  # nothing is measured, so nothing differs from run to run
    Recorded.made = 0


def vit(**settings):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=10, **settings
    )
    return uvc.convert(model)


def stepper(model, captured, task=None):
    """Runs steps of a training loop, through `captured` or, None, without it; gives loss and gradients."""
    task = task or Classification()

    def run(images, labels):
        loss = task(model, images, labels)["loss"]
        loss.backward()
        return loss.detach()

    def step(images, labels):
        model.zero_grad(set_to_none=True)
        loss = None if captured is None else captured.gradients((images, labels), (task,), run)
        loss = run(images, labels) if loss is None else loss
        return [loss, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]

    return step


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )


def same(one, other):
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_steps_equal_plain_ones_and_a_new_structure_is_captured_anew(distilled, precision):
    model, other = vit(), vit()
    teacher = vit()
    captured = Captured(model, Recorded)

    def task():
        if distilled:
            return Distillation(copy.deepcopy(teacher), DistillConfig(features=0.5), precision=precision)
        return Classification(precision=precision)

    step, plain = stepper(model, captured, task()), stepper(other, None, task())
    structures = [
        None,
        uvc.Structure.random(model, keep=0.5, seed=0),
        uvc.Structure.random(model, keep=0.7, seed=1),
    ]
    for structure in structures:
        for m in (model, other):
            uvc.apply_structure(m, structure or uvc.Structure.dense(m))
        for batch in batches(7):
            assert same(step(*batch), plain(*batch))
    assert captured.captures == Recorded.made == 3


def test_weights_that_an_optimiser_changes_are_read_anew():
    model, other = vit(), vit()
    step, plain = stepper(model, Captured(model, Recorded)), stepper(other, None)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in (model, other)]
    for batch in batches(10):
        assert same(step(*batch), plain(*batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert same(list(model.parameters()), list(other.parameters())) and Recorded.made == 1


def test_a_batch_of_another_size_and_a_block_that_is_skipped_run_plain_first():
    model, other = vit(), vit()
    captured = Captured(model, Recorded)
    step, plain = stepper(model, captured), stepper(other, None)
    for size, skip in ((4, False), (3, False), (4, True)):
        for m in (model, other):
            m.blocks[1].set_skip(skip, False)
        for batch in batches(6, size):
            assert same(step(*batch), plain(*batch))
    assert captured.captures == 3


def test_dropout_draws_in_a_replay_what_it_would_draw_in_a_plain_step():
    model = vit(proj_drop_rate=0.3)
    captured = Captured(model, Recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            stepper(model, captured)  # a task of its own: never the same step
        step = stepper(model, captured)
        losses = [step(*batch)[0] for batch in [next(batches(1))] * 8]
    assert captured.captures == 1 and len({loss.item() for loss in losses}) == 8


@pytest.mark.parametrize("what", ["gates", "watched halves"])
def test_a_pass_with_effects_of_its_own_runs_plain(what):
    model = vit()
    if what == "gates":
        model.blocks[0].set_gates(torch.ones(()), None)
    else:
        model.blocks[0].attn.register_forward_pre_hook(lambda module, args: None)
    step = stepper(model, Captured(model, Recorded))
    for batch in batches(6):
        step(*batch)
    assert Recorded.made == 0


def test_a_step_that_reads_a_tensor_back_is_left_plain_with_one_warning():
    model, other = vit(), vit()

    class Reading(Classification):
        def __call__(self, model, images, labels):
            found = super().__call__(model, images, labels)
            return found | {"loss": found["loss"] * (2.0 if found["loss"].item() > 0 else 1.0)}

    captured = Captured(model, Recorded)
    step, plain = stepper(model, captured, Reading()), stepper(other, None, Reading())
    with pytest.warns(RuntimeWarning, match="not captured .* from here on: RuntimeError: aten::") as said:
        for batch in batches(8):
            assert same(step(*batch), plain(*batch))
    assert len(said) == 1 and captured.captures == 0 and Recorded.made == 1


def test_a_graph_that_computes_something_else_is_not_trusted():
    class Wrong(Recorded):
        def replay(self):
            super().replay()
            for _, _, _, out in self.calls[-3:]:
                for place in tree_leaves(out):
                    place.detach().mul_(1.5)

    model, other = vit(), vit()
    step, plain = stepper(model, Captured(model, Wrong)), stepper(other, None)
    with pytest.warns(RuntimeWarning, match="a replay misses gradients"):
        for batch in batches(6):
            assert same(step(*batch), plain(*batch))


def test_hooks_of_others_are_called_in_every_step():
    model, seen = vit(), []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    step = stepper(model, Captured(model, Recorded))
    with pytest.warns(RuntimeWarning, match="head has a hook"):
        for batch in batches(6):
            step(*batch)
    assert len(seen) == 6


def updater(model, captured, update, optimizer):
    """Runs whole steps of training, their gradients and updates by graphs where there are some."""
    step = stepper(model, captured)

    def run(images, labels, rate):
        loss, *_ = step(images, labels)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        norm = None if update is None else update.step(optimizer, captured.static)
        if norm is None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss, norm]

    return run


def adamw(model, **settings):
    one, other = torch.chunk(torch.arange(len(list(model.parameters()))), 2)
    parameters = list(model.parameters())
    groups = [
        {"params": [parameters[i] for i in one], "weight_decay": 0.0},
        {"params": [parameters[i] for i in other], "lr_scale": 0.25},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, **settings)


def moments(optimizer):
    return [t for state in optimizer.state.values() for t in state.values()]


def test_weights_and_moments_from_captured_updates_equal_plain_ones_through_rates_and_structures():
    model, other = vit(), vit()
    captured, update = Captured(model, Recorded), CapturedUpdate(Recorded, 0.5)
    optimizer, plain = (adamw(m, fused=True) for m in (model, other))
    run, expected = updater(model, captured, update, optimizer), updater(other, None, None, plain)
    for keep in (1.0, 0.5, 0.7):
        for m in (model, other):
            uvc.apply_structure(m, uvc.Structure.random(m, keep=keep, seed=0))
        for i, batch in enumerate(batches(8)):
            rate = 1e-3 * (1 + i) / 7
            assert same(run(*batch, rate), expected(*batch, rate))
            assert [group["lr"] for group in optimizer.param_groups] == [rate, rate * 0.25]
    assert same(list(model.parameters()), list(other.parameters()))
    assert same(moments(optimizer), moments(plain)) and moments(optimizer)
    assert captured.captures == update.captures == 3 and Recorded.made == 6


def test_a_new_optimiser_is_captured_once_it_has_begun_and_another_kind_or_a_watched_one_never():
    model = vit()
    captured, update = Captured(model, Recorded), CapturedUpdate(Recorded, 0.5)
    for settings, hook, captures in (
        ({"fused": True}, None, 1),
        ({"fused": True}, None, 2),
        ({"foreach": True}, None, 2),
        ({"fused": True}, lambda *_: None, 2),
    ):
        optimizer = adamw(model, **settings)
        if hook:
            optimizer.register_step_post_hook(hook)
        run = updater(model, captured, update, optimizer)
        for batch in batches(6):
            run(*batch, 1e-3)
        assert update.captures == captures


@pytest.mark.parametrize("fault", ["computes something else", "cannot be captured"])
def test_an_update_that_is_not_the_plain_one_is_left_plain_with_one_warning(fault):
    class Wrong(Recorded):
        @contextmanager
        def recording(self):
            if fault == "cannot be captured":
                raise RuntimeError("out of memory\nand more")
            with super().recording():
                yield

        @torch.no_grad()
        def replay(self):
            super().replay()
            fused = next(args for func, args, *_ in self.calls if "fused_adamw" in func.name())
            fused[0][0].add_(1.0)  # a weight

    model, other = vit(), vit()
    captured, update = Captured(model, Recorded), CapturedUpdate(Wrong, 0.5)
    optimizer, plain = (adamw(m, fused=True) for m in (model, other))
    run, expected = updater(model, captured, update, optimizer), updater(other, None, None, plain)
    with pytest.warns(RuntimeWarning, match="optimiser's step is not captured") as said:
        for batch in batches(8):
            assert same(run(*batch, 1e-3), expected(*batch, 1e-3))
    assert len(said) == 1 and update.captures == 0 and captured.captures == 1
    assert same(list(model.parameters()), list(other.parameters()))
    assert same(moments(optimizer), moments(plain))


def test_a_whole_run_is_the_same_from_graphs(monkeypatch):
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))

    def run():
        loader = DataLoader(TensorDataset(images, labels), batch_size=8)
        config = Config(teacher_epochs=1, warmup_epochs=1, search_epochs=6, post_epochs=2)
        result = uvc.compress(vit(), loader, loader, budget=0.6, config=config)
        return result.structure, list(result.model.state_dict().values())

    structure, weights = run()
    made = []

    def on(cls, model, alone):
        made.append(cls(model, Recorded))
        return made[-1]

    monkeypatch.setattr(Captured, "on", classmethod(on))
    found, others = run()
    assert found == structure and same(weights, others)
    # the teacher, the warm-up, and what of the search and after it stays for some steps
    assert all(captured.graphs is Recorded for captured in made)
    captures = sum(captured.captures for captured in made)
    assert captures >= 3 and Recorded.made > captures  # updates, too


def test_only_a_model_on_a_gpu_that_one_process_trains_is_captured(monkeypatch):
    assert Captured.on(vit(), alone=True).graphs is None

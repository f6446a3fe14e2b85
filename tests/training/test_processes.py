"""Several processes train as one does: one global batch, one structure, gradients of kept rows alone."""

import dataclasses
import os
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gang import gang
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_compress import CONFIG, digits_model
from torch.utils.data import DataLoader, TensorDataset
from uvc_kernels import autotune

from uvc.config import SolverConfig
from uvc.costs import cost
from uvc.layers import convert
from uvc.solver.search import Search
from uvc.structure import Structure, apply_structure, structure_of
from uvc.training.compress import compress
from uvc.training.data import load_data
from uvc.training.loaders import TensorLoader
from uvc.training.processes import Several, here
from uvc.training.reduction import Reduction
from uvc.training.shares import Share, check_share
from uvc.training.signals import Stopped

# 6 steps in an epoch.
SEARCH = dataclasses.replace(CONFIG, warmup_epochs=0, search_epochs=10, post_epochs=1, batch_size=160)
SHORT = dataclasses.replace(SEARCH, search_epochs=2)
# What a weight moves if AdamW pushes it one way in all of the 66 steps: about 60 x 1e-3 / 2 + 6 x 2e-3 / 2.
REACH = 0.036


def digits(batch_size=160):
    return load_data("digits", model_input=(1, 8, 8), batch_size=batch_size, seed=0, validation="val")


def watch(do):
    """Calls `do(search)` after each of its steps."""
    step = Search.step

    def watched(self, optimizer):
        step(self, optimizer)
        do(self)

    Search.step = watched


def search(changes):
    """A run of 60 search steps and 6 more: the structure after each step, the weights, what was counted."""
    seen, data = [], digits()
    watch(lambda self: seen.append(structure_of(self.model).to_json()))
    config = dataclasses.replace(SEARCH, **changes)
    result = compress(digits_model(), data.train, data.val, 0.5, config=config)
    return seen, weights(result), result.structure, result.teacher_top1, result.final_top1


def weights(result):
    return {name: tensor.numpy() for name, tensor in result.model.state_dict().items()}


def farthest(a, b):
    return max(float(abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize(
    "changes", [{}, {"mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9}], ids=["plain", "mixed"]
)
def test_processes_agree_in_every_step_and_with_one_process(changes):
    (alone,) = gang(1, search, changes)
    assert len(alone[0]) == 60 and len(set(alone[0])) > 5
    for count in (2, 4) if not changes else (2,):
        ranks = gang(count, search, changes)
        for rank in ranks:
            assert rank[0] == ranks[0][0]
            assert farthest(rank[1], ranks[0][1]) == 0 and rank[2:] == ranks[0][2:]
        assert ranks[0][0] == alone[0] and ranks[0][2] == alone[2]
        print(f"{count} processes: farthest weight {farthest(ranks[0][1], alone[1]):.1e}")
        assert farthest(ranks[0][1], alone[1]) < 0.05 * REACH
        assert ranks[0][3] == alone[3]  # each image counts once


def budgets():
    """One model for three budgets."""
    data = digits()
    config = dataclasses.replace(SHORT, search_epochs=6)
    result = compress(digits_model(), data.train, data.val, (0.7, 0.5, 0.3), config=config)
    return weights(result), result.structures, result.before_post_scores


def test_processes_find_the_nested_structures_of_one_process_and_train_them_alike():
    (alone,), ranks = gang(1, budgets), gang(2, budgets)
    assert ranks[0][1:] == ranks[1][1:] and ranks[0][1] == alone[1]
    assert farthest(ranks[0][0], ranks[1][0]) == 0
    assert farthest(ranks[0][0], alone[0]) < 0.05 * REACH


def users(workers):
    """A user's own loaders, whose order comes from torch's global generator."""
    images, labels = (t[:700] for t in (digits().train.images, digits().train.labels))
    train = DataLoader(TensorDataset(images, labels), 100, shuffle=True, drop_last=True)
    val = DataLoader(TensorDataset(images[:333], labels[:333]), 50, shuffle=True)
    torch.manual_seed(0)
    result = compress(digits_model(), train, val, 0.6, config=SHORT)
    return weights(result), result.structure, result.teacher_top1


def threads_of(asked):
    """How many threads a process has that had one, where no variable of the environment says."""
    os.environ.pop("OMP_NUM_THREADS", None)
    with warnings.catch_warnings(action="error"):
        here("cpu", asked)
    dist.barrier()  # whose place they meet at must not leave before the others are there
    return torch.get_num_threads()


def test_processes_keep_the_threads_they_were_given():
    assert gang(2, threads_of, None) == [1, 1]
    assert gang(2, threads_of, 3) == [3, 3]


def test_users_loaders_are_read_once_and_handed_out():
    (alone,), ranks = gang(1, users, 0), gang(2, users, 0)
    assert ranks[0][1:] == ranks[1][1:] == alone[1:]
    assert farthest(ranks[0][0], alone[0]) < 0.05 * REACH


class Named(NamedTuple):
    """A batch of one's own kind."""

    pixels: torch.Tensor
    about: dict


def own_batches(workers):
    """Batches of named fields, among them a list of names and a number."""
    images, labels = (t[:700] for t in (digits().train.images, digits().train.labels))

    class Batches(list):
        def __iter__(self):
            for rows in torch.randperm(700).split(100):
                about = {"classes": labels[rows], "names": [f"image {i}" for i in rows.tolist()], "size": 8}
                yield Named(images[rows], about)

    return Batches([None] * 7)


def own_loss(model, batch):
    assert isinstance(batch, Named) and batch.about["size"] == 8
    assert len(batch.about["names"]) == len(batch.pixels)
    return {"loss": F.cross_entropy(model(batch.pixels), batch.about["classes"])}


def own_score(model):
    val = digits().val
    right = [(model(images).argmax(1) == labels).sum() for images, labels in val]
    return 100 * float(sum(right)) / sum(len(labels) for _, labels in val)


def own(changes):
    """A run with a loss and a score of one's own."""
    torch.manual_seed(0)
    config = dataclasses.replace(SHORT, **changes)
    result = compress(
        digits_model(), own_batches(0), budget=0.6, config=config, loss=own_loss, evaluate=own_score
    )
    return weights(result), result.structure, result.teacher_score


@pytest.mark.parametrize("changes", [{}, {"fsdp": True}], ids=["whole", "spread"])
def test_a_loss_of_ones_own_is_that_of_the_global_batch(changes):
    (alone,), ranks = gang(1, own, {}), gang(2, own, changes)
    assert ranks[0][1:] == ranks[1][1:] == alone[1:]
    assert farthest(ranks[0][0], ranks[1][0]) == 0 and farthest(ranks[0][0], alone[0]) < 0.05 * REACH


def meddle(field, changes):
    """Rank 1 goes its own way after the sixth step."""

    def change(self):
        if self.count != 6 or os.environ["RANK"] != "1":
            return
        if field == "structure":
            self.groups.blocks[0].mlp.set_kept(torch.arange(96) > 3)
        elif field == "z":
            self.state.z += 1e-7
        elif field == "generator":
            self.generator.manual_seed(5)

    watch(change)
    seed = int(os.environ["RANK"]) if field == "seed" else 0
    data, config = digits(), dataclasses.replace(SHORT, seed=seed, **changes)
    return compress(digits_model(), data.train, data.val, 0.6, config=config)


@pytest.mark.parametrize("field", ["structure", "z", "generator", "seed"])
def test_a_rank_that_differs_is_caught_at_that_step(field):
    where = "before training" if field == "seed" else "search: epoch 1, batch 0"
    for found in gang(2, meddle, field, {}):
        assert isinstance(found, RuntimeError) and str(found).startswith(
            f"{where}: the 2 processes differ in {field};"
        )


def own_kernels():
    """A run whose process of rank 1 has measured other kernels to be the fastest, as under load it may."""
    if os.environ["RANK"] == "1":
        autotune.choose = lambda op, *_, **__: autotune._variants[op, "dense"]
    data = digits()
    result = compress(digits_model(), data.train, data.val, 0.6, config=SHORT)
    return weights(result), result.structure


def test_processes_may_have_measured_other_kernels_to_be_the_fastest():
    (alone,), ranks = gang(1, own_kernels), gang(2, own_kernels)
    assert ranks[0][1] == ranks[1][1] == alone[1]
    assert farthest(ranks[0][0], ranks[1][0]) == 0 and farthest(ranks[0][0], alone[0]) < 0.05 * REACH


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bytes_follow_the_kept_parameters(one_process):
    model = convert(digits_model(embed_dim=64, depth=3, num_heads=4))
    reduction, dense = Reduction(model, 1, bucket=100_000), 4 * cost(model).params
    images, found = torch.randn(8, 1, 8, 8), []
    for structure in (
        Structure.dense(model),
        Structure.uniform(model, heads=0.5, neurons=0.5),
        Structure.uniform(model, heads=0.25, neurons=0.25),
        Structure.random(model, keep=0.5, seed=0),
        Structure.uniform(model, heads=0.5, neurons=0.5, blocks=0.67),
    ):
        apply_structure(model, structure)
        model.zero_grad()
        reduction.facts()
        reduction.begin()
        model(images).square().mean().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        reduction.finish([torch.zeros(())])
        # Of one process the mean is what it was; nothing that is not zero was left out.
        assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in before.items())
        kept = 4 * cost(model).params
        assert abs(reduction.sent / kept - 1) < 0.001
        found.append(f"{kept / dense:.3f} of the parameters, {reduction.sent / dense:.3f} of the bytes")
    print(*found, sep="\n")


def test_gradients_of_an_earlier_pass_are_sent_with_those_of_the_last(one_process):
    model = convert(digits_model())
    reduction = Reduction(model, 1)
    images = torch.randn(8, 1, 8, 8)
    reduction.facts()
    model(images).square().mean().backward()
    model.blocks[0].set_skip(True, True)
    reduction.begin()
    model(images).square().mean().backward()
    reduction.finish([torch.zeros(())])
    assert reduction.sent == 4 * (sum(p.numel() for p in model.parameters()) + 1)


def test_shares_are_a_partition_and_keep_pairs_together():
    for batch, count in ((16, 4), (12, 4), (7, 3), (2, 3), (0, 2)):
        places = torch.arange(batch)
        rows = [
            places[Share(rank, count).rows(batch, training)] for rank in range(count) for training in (False,)
        ]
        assert torch.cat(rows).tolist() == places.tolist()
    for batch, count in ((16, 4), (12, 2), (12, 4)):
        rows = [torch.arange(batch)[Share(rank, count).rows(batch, True)] for rank in range(count)]
        assert sorted(torch.cat(rows).tolist()) == list(range(batch))
        if batch % (2 * count) == 0:
            assert all(part.flip(0).tolist() == (batch - 1 - part).tolist() for part in rows)


@pytest.mark.parametrize(
    ("loader", "count", "mixes", "says"),
    [
        (
            lambda images: TensorLoader(images, images[:, 0, 0, 0], 10, training=True),
            4,
            False,
            "10 images, which 4",
        ),
        (
            lambda images: TensorLoader(images, images[:, 0, 0, 0], 12, training=True),
            4,
            True,
            "multiple of 8",
        ),
        (lambda images: DataLoader(TensorDataset(images), 10), 2, False, "its last batch has 5 images"),
        (lambda images: DataLoader(TensorDataset(images), 9, drop_last=True), 2, False, "multiple of 2"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(loader, count, mixes, says):
    with pytest.raises(ValueError, match=says):
        check_share(loader(torch.zeros(25, 1, 8, 8)), count, mixes)


def parts(solver, **changes):
    data = digits()
    config = dataclasses.replace(SHORT, solver=SolverConfig(method=solver), **changes)
    return weights(compress(digits_model(), data.train, data.val, 0.6, config=config))


@pytest.mark.parametrize("solver", ["uvc", "published"])
def test_batches_in_parts_and_recomputed_blocks_train_alike(solver):
    whole = parts(solver)
    assert farthest(whole, parts(solver, accumulate=3)) < 0.05 * REACH
    assert farthest(whole, parts(solver, grad_checkpointing=True)) < 0.05 * REACH


def three_steps(changes, solver):
    """What was compared in three steps of a search, or why there is none."""
    data = digits(changes["batch_size"])
    config = dataclasses.replace(
        SHORT, search_epochs=1, post_epochs=0, solver=SolverConfig(**solver), **changes
    )
    facts, compare = [], Several.compare

    def watched(self, say, *flags):
        facts.append({name: repr(value) for name, value in say().items()})
        compare(self, say, *flags)
        if len(facts) == 5:  # the settings, and four steps: the last has seen the end of the third
            raise Stopped

    Several.compare = watched
    try:
        compress(digits_model(), data.train, data.val, 0.6, config=config)
    except Stopped:
        return facts
    except ValueError as error:
        return str(error)
    finally:
        Several.compare = compare


def several(drawn):
    return [three_steps(*one) for one in drawn]


CONFIGURATIONS = st.tuples(
    st.fixed_dictionaries(
        {
            "accumulate": st.sampled_from([1, 2, 3]),
            "precision": st.sampled_from(["float32", "bfloat16", "float16"]),
            "grad_checkpointing": st.booleans(),
            "mixup": st.sampled_from([0.0, 0.8]),
            "ema_decay": st.sampled_from([0.0, 0.0, 0.9]),
            "batch_size": st.sampled_from([160, 160, 160, 96, 98, 75]),
            "fsdp": st.sampled_from([False, False, False, True]),
        }
    ),
    st.fixed_dictionaries(
        {
            "skip": st.sampled_from(["none", "blocks", "halves"]),
            "tokens": st.sampled_from([0, 1, 2]),
            "every": st.sampled_from([1, 2]),
            "anneal": st.just((0.0, 0.5)),
            "method": st.sampled_from(["uvc", "uvc", "published"]),
        }
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_drawn_configurations_agree_for_three_steps_or_are_refused_in_one_line():
    drawn = []

    # On a busy machine drawing may take seconds.
    slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

    @settings(max_examples=30, derandomize=True, phases=[Phase.generate], database=None, **slow)
    @given(CONFIGURATIONS)
    def draw(one):
        drawn.append(one)

    draw()
    ranks = gang(2, several, drawn, seconds=2400)
    assert len(drawn) == 30 and not any(isinstance(rank, BaseException) or rank is None for rank in ranks), (
        ranks
    )
    refused = []
    for one, first, second in zip(drawn, *ranks, strict=True):
        assert first == second and first is not None, one
        assert len(first) == 5 if isinstance(first, list) else "\n" not in first, one
        refused += [first] if isinstance(first, str) else []
    print(f"{len(drawn) - len(refused)} ran, {len(refused)} were refused:", *sorted(set(refused)), sep="\n")

"""Dispatch by measurement: what is measured, when, and what is kept on disk."""

import json
import random
import stat
import warnings

import pytest
import torch
import uvc_kernels
from torch.utils.checkpoint import checkpoint
from uvc_kernels import _dispatch, autotune, dense
from uvc_kernels.attention import attention_reference
from uvc_kernels.mlp import mlp_reference
from uvc_kernels.weights import AttentionWeights, MlpWeights


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Measuring is on, with an empty cache of its own and times that a test can set."""
    monkeypatch.setenv("UVC_MEASURE", "1")
    monkeypatch.setenv("UVC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_served", {})
    monkeypatch.setattr(autotune, "_ran", {})
    torch.use_deterministic_algorithms(False)


def times(monkeypatch, **ms):
    """Lets the measurement find these times; returns the list of what was measured."""
    asked = []

    def measured(op, names, arguments, packing=None):
        asked.append((op, tuple(names)))
        return {name: [ms[name]] * autotune.ROUNDS for name in names}

    monkeypatch.setattr(autotune, "_times", measured)
    return asked


def call(keep=50, batch=2, mlp=uvc_kernels.mlp):
    kept = uvc_kernels.kept_neurons(torch.arange(100) < keep)
    x, w1, w2 = torch.ones(batch, 5, 8), torch.ones(100, 8), torch.ones(8, 100)
    return mlp(x, w1, None, w2, None, kept)


def choices(tmp_path):
    (file,) = tmp_path.glob("*.json")
    return json.loads(file.read_text())["choices"]


def test_the_faster_one_serves_and_a_tie_leaves_the_kernel(monkeypatch, tmp_path):
    asked = times(monkeypatch, cpu=1.0, dense=0.98)
    call(50)
    times(monkeypatch, cpu=1.0, dense=0.5)
    call(99)
    assert asked == [("mlp", ("cpu", "dense"))]
    assert sorted(choice["fastest"] for choice in choices(tmp_path).values()) == ["cpu", "dense"]


def test_a_noisy_moment_leaves_the_kernel():
    """Equally fast, with samples that scatter by a tenth: now and then five rounds would find one faster."""
    draw = random.Random(0)

    def samples(mean):
        return [draw.gauss(mean, 0.1 * mean) for _ in range(autotune.ROUNDS)]

    equal = [autotune._fastest({"cpu": samples(1.0), "dense": samples(1.0)}, "cpu") for _ in range(500)]
    half = [autotune._fastest({"cpu": samples(1.0), "dense": samples(0.5)}, "cpu") for _ in range(500)]
    assert equal.count("dense") < 15 and half.count("cpu") == 0


def test_one_round_that_was_disturbed_decides_nothing():
    fast, slow = [0.8] * 6 + [3.0], [1.0] * 7
    assert autotune._fastest({"cpu": slow, "dense": fast}, "cpu") == "dense"
    assert autotune._fastest({"cpu": fast, "dense": slow}, "cpu") == "cpu"


def test_a_choice_is_measured_anew_after_a_day(monkeypatch, tmp_path):
    times(monkeypatch, cpu=1.0, dense=0.5)
    call()
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    for choice in content["choices"].values():
        choice["at"] -= autotune.LASTS + 1
    file.write_text(json.dumps(content))
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_served", {})
    asked = times(monkeypatch, cpu=1.0, dense=2.0)
    call()
    (choice,) = choices(tmp_path).values()
    assert len(asked) == 1 and choice["fastest"] == "cpu"


@pytest.mark.parametrize("what", ["torch", "extension", "instructions", "products", "processors"])
def test_what_another_build_found_does_not_count(what, monkeypatch):
    times(monkeypatch, cpu=1.0, dense=0.5)
    call()
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_served", {})
    build = autotune._build()
    monkeypatch.setattr(autotune, "_build", lambda: {**build, what: "other"})
    asked = times(monkeypatch, cpu=1.0, dense=0.5)
    call()
    assert len(asked) == 1


def test_every_processor_has_a_file_of_its_own(monkeypatch):
    here = autotune.cache_file(torch.device("cpu"))
    monkeypatch.setattr(autotune, "_processor", lambda: "Another(R) CPU 6 207")
    assert (
        autotune.cache_file(torch.device("cpu")).name == "fastest-cpu-another-r-cpu-6-207.json" != here.name
    )


def test_threads_are_part_of_a_case(monkeypatch):
    asked = times(monkeypatch, cpu=1.0, dense=2.0)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        call()
    assert len(asked) == 2


def test_gradients_of_a_measurement_are_those_of_a_step(monkeypatch):
    seen = []

    def watched(x, weights):
        out = (x * weights.fc1_bias) @ weights.fc1_weight.T @ weights.fc2_weight.T
        out.register_hook(lambda grad: seen.append(grad.std().item()))
        return out

    monkeypatch.setitem(autotune._variants, ("mlp", "watched"), watched)
    weights = MlpWeights(torch.ones(8, 8), torch.ones(8), torch.ones(8, 8), None)
    found = autotune._times("mlp", ["watched"], (torch.randn(4, 5, 8), weights))
    assert len(found["watched"]) == autotune.ROUNDS < len(seen)
    assert all(5e-4 < spread < 2e-3 for spread in seen)


def test_where_memory_counts_only_what_recomputes_is_measured(monkeypatch):
    asked = times(monkeypatch, cpu=1.0, dense=0.1)
    call(mlp=lambda *arguments: uvc_kernels.mlp(*arguments, recompute=True))
    assert asked == [("mlp", ("cpu",))]


def test_a_case_is_measured_once_and_neighbouring_counts_share_it(monkeypatch):
    asked = times(monkeypatch, cpu=1.0, dense=2.0)
    for keep in (50, 50, 49, 45):
        call(keep)
    assert len(asked) == 1
    call(30)
    call(50, batch=16)
    assert len(asked) == 3


def test_another_process_reads_what_was_measured(monkeypatch):
    times(monkeypatch, cpu=1.0, dense=0.5)
    call()
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_served", {})
    asked = times(monkeypatch)
    call()
    assert asked == []


def test_inference_and_training_are_different_cases(monkeypatch):
    asked = times(monkeypatch, cpu=1.0, dense=2.0)
    call()
    with torch.no_grad():
        call()
    assert len(asked) == 2


@pytest.mark.parametrize("content", ["", "no json", "[]", '{"build": {}, "choices": {}}', '{"choices": 3}'])
def test_a_file_that_is_not_ours_is_replaced(content, monkeypatch, tmp_path):
    path = autotune.cache_file(torch.device("cpu"))
    path.write_text(content)
    asked = times(monkeypatch, cpu=1.0, dense=2.0)
    call()
    assert len(asked) == 1 and len(choices(tmp_path)) == 1


def test_what_no_longer_serves_is_not_taken_from_the_file(monkeypatch):
    times(monkeypatch, cpu=1.0, dense=2.0)
    call()
    (known,) = autotune._known.values()
    for choice in known.values():
        choice["fastest"] = "cuda"
    assert call().isfinite().all()


def test_a_folder_that_cannot_be_written_is_said_once(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("UVC_CACHE_DIR", str(blocked))
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    times(monkeypatch, cpu=1.0, dense=2.0)
    with pytest.warns(RuntimeWarning, match="cannot be kept in .*; set UVC_CACHE_DIR"):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(10)


def test_a_user_without_a_home_is_told_once_that_nothing_is_kept(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("UVC_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    asked = times(monkeypatch, cpu=1.0, dense=2.0)
    with pytest.warns(RuntimeWarning, match="cannot be kept .the user has no home.*; set UVC_CACHE_DIR"):
        call()
    count = len(asked)
    call()
    assert count and len(asked) == count  # the choice holds in this process


@pytest.mark.parametrize("how", ["switched off", "forced", "deterministic", "traced"])
def test_nothing_is_measured_when(how, monkeypatch):
    asked = times(monkeypatch, cpu=1.0, dense=0.1)
    if how == "switched off":
        monkeypatch.setenv("UVC_MEASURE", "0")
    if how == "forced":
        monkeypatch.setenv("UVC_BACKEND", "reference")
    if how == "deterministic":
        torch.use_deterministic_algorithms(True)
    if how == "traced":
        call(mlp=torch.compile(uvc_kernels.mlp, backend="eager", fullgraph=True))
    else:
        call()
    assert asked == []


def traced():
    """The compiled op, and for each of its graphs whether the cpu kernel is in it."""
    kernels = []

    def keep(graph, _):
        kernels.append(any("uvc_kernels.mlp" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(uvc_kernels.mlp, backend=keep, fullgraph=True), kernels


@pytest.mark.parametrize("fastest", ["cpu", "dense"])
def test_a_trace_takes_what_was_measured_before(fastest, monkeypatch):
    asked = times(monkeypatch, **{"cpu": 1.0, "dense": 1.0, fastest: 0.5})
    call()
    mlp, kernels = traced()
    call(mlp=mlp)
    assert len(asked) == 1 and kernels == [fastest == "cpu"]


def test_a_trace_with_symbolic_counts_takes_what_was_measured_for_that_eighth(monkeypatch):
    times(monkeypatch, cpu=1.0, dense=0.5)
    call(50)
    times(monkeypatch, cpu=1.0, dense=2.0)
    call(20)
    mlp, kernels = traced()
    for count in (45, 50, 46, 20, 22):
        call(count, mlp=mlp)
    # The first trace is of one count, the second of all counts of the eighth.
    assert kernels == [False, False, True]


def test_a_trace_with_a_symbolic_batch_keeps_the_order_of_preference(monkeypatch):
    times(monkeypatch, cpu=1.0, dense=0.5)
    mlp, kernels = traced()
    for batch in (2, 3, 5, 7):
        call(batch=batch)
        call(batch=batch, mlp=mlp)
    assert kernels == [False, True]


@pytest.fixture
def capture(monkeypatch):
    """Two kernels of a GPU that are not there: sets whether a graph is captured, records what is launched."""
    launched = []

    def on(capturing):
        monkeypatch.setattr(_dispatch, "capturing", lambda device: capturing)

    monkeypatch.setattr(_dispatch, "able", lambda *_: ["triton", "cuda"])
    record = lambda name: lambda x, *_: launched.append(name) or x  # noqa: E731
    monkeypatch.setattr(_dispatch, "run_of", lambda op, name: record(name))
    monkeypatch.setitem(autotune._variants, ("mlp", "dense"), record("dense"))
    on(False)
    return on, launched


def test_a_captured_graph_takes_what_was_measured_before(capture, monkeypatch):
    on, launched = capture
    asked = times(monkeypatch, triton=2.0, cuda=1.0, dense=3.0)
    call()
    on(True)
    call()
    assert launched == ["cuda", "cuda"] and len(asked) == 1


def test_a_captured_graph_takes_no_kernel_that_must_be_loaded_first(capture, monkeypatch):
    on, launched = capture
    times(monkeypatch, triton=2.0, cuda=1.0, dense=3.0)
    call()
    # Another process: the choice is on disk, and no kernel has run.
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_served", {})
    monkeypatch.setattr(autotune, "_ran", {})
    asked = times(monkeypatch)
    for capturing in (True, False, True):
        on(capturing)
        call()
    assert launched == ["cuda", "dense", "cuda", "cuda"] and asked == []


def test_a_captured_graph_without_a_measurement_takes_full_products(capture, monkeypatch):
    on, launched = capture
    asked = times(monkeypatch)
    on(True)
    call()
    assert launched == ["dense"] and asked == []


def test_a_counting_mode_does_not_see_a_measurement(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    asked = times(monkeypatch, cpu=1.0, dense=0.1)
    with FlopCounterMode(display=False):
        call()
    assert asked == []


def test_a_real_measurement_changes_neither_gradients_nor_random_numbers(tmp_path):
    leaf = torch.ones(100, 8, requires_grad=True)
    kept = uvc_kernels.kept_neurons(torch.arange(100) < 50)
    before = torch.get_rng_state()
    uvc_kernels.mlp(torch.ones(2, 5, 8), leaf, None, torch.ones(8, 100), None, kept)
    assert leaf.grad is None and torch.equal(torch.get_rng_state(), before)
    (choice,) = choices(tmp_path).values()
    assert choice["fastest"] in ("cpu", "dense") and all(ms > 0 for ms in choice["ms"].values())
    (file,) = tmp_path.glob("*.json")
    assert stat.S_ISREG(file.stat().st_mode)


def test_a_measurement_under_gradient_checkpointing_is_no_part_of_what_that_computes_again():
    x, w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 8), (100, 8), (8, 100)))
    kept = uvc_kernels.kept_neurons(torch.arange(100) < 50)
    out = checkpoint(uvc_kernels.mlp, x, w1, None, w2, None, kept, use_reentrant=False)
    found = torch.autograd.grad(out.sum(), (x, w1, w2))
    expected = torch.autograd.grad(uvc_kernels.mlp(x, w1, None, w2, None, kept).sum(), (x, w1, w2))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("gated", [False, True])
def test_full_products_equal_the_reference_and_its_gradients(gated):
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 17, 8), (40, 8), (40,), (8, 40), (8,))]
    extra = [torch.randn(40, 8, dtype=torch.float64), torch.randn(40, dtype=torch.float64)] if gated else []
    kept = uvc_kernels.kept_neurons(torch.rand(40) < 0.5)
    leaves = [t.requires_grad_() for t in (*tensors, *extra)]
    results = []
    weights = MlpWeights(*leaves[1:])
    for mlp in (dense.mlp_dense, mlp_reference):
        out = mlp(leaves[0], weights, kept, "silu", None, False)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_full_attention_equals_the_reference_and_its_gradients():
    shapes = ((2, 17, 24), (72, 24), (72,), (24, 24), (24,))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    qk, v = torch.rand(3, 8) < 0.5, torch.rand(3, 8) < 0.5
    v[1] = False
    kept = uvc_kernels.kept_heads(qk, v)
    results = []
    weights = AttentionWeights(*leaves[1:])
    for attention in (dense.attention_dense, attention_reference):
        out = attention(leaves[0], weights, kept, 0.3, None, False)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_a_call_like_one_before_looks_nothing_up(monkeypatch):
    times(monkeypatch, cpu=1.0, dense=2.0)
    call()
    for module, name in ((_dispatch, "able"), (autotune, "_recorded"), (autotune, "_key")):
        monkeypatch.setattr(module, name, lambda *_: 1 / 0)
    call()
    for other in (lambda: call(batch=3), lambda: call(keep=30)):
        with pytest.raises(ZeroDivisionError):
            other()
    with uvc_kernels.backend("reference"):  # what is forced is not looked up, and serves
        call()
    monkeypatch.setenv("UVC_BACKEND", "reference")
    call()


def test_where_weights_are_packed_ahead_a_measurement_shares_the_launch(monkeypatch):
    """What packs is given packed weights, and its packing counts for one of many layers."""
    kept = uvc_kernels.kept_neurons(torch.arange(16) < 8)
    x, w1, w2 = torch.randn(2, 5, 8), torch.randn(16, 8), torch.randn(8, 16)
    weights, seen, packed = MlpWeights(w1, None, w2, None), [], []

    def packing(w):
        return uvc_kernels.mlp_packing(*w[:2], *w[4:], *w[2:4], kept)

    def run(x, w, kept, activation, ready, recompute):
        seen.append(ready)
        parts = [t for t in (ready or w) if t is not None]
        return x * sum(t.sum() for t in parts)

    def gather(sources, *rest):
        packed.append(len(sources))
        return uvc_kernels.gather(sources, *rest)

    made = _dispatch._Implementation(run, "cpu", frozenset({torch.float32}), packs=True)
    monkeypatch.setitem(_dispatch._implementations, ("mlp", "cuda"), made)
    monkeypatch.setitem(autotune._variants, ("mlp", "plain"), run)
    monkeypatch.setattr(autotune, "gather", gather)
    found = autotune._times("mlp", ["cuda", "plain"], (x, weights, kept, "gelu", "ahead", False), packing)
    assert len(found["cuda"]) == len(found["plain"]) == autotune.ROUNDS
    assert {type(ready) for ready in seen} == {list, type(None)}
    assert packed[0] == 6 and set(packed[1:]) == {6 * autotune.TOGETHER} and len(packed) > autotune.ROUNDS

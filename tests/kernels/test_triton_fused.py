"""Attention and MLP with the structure in a device buffer: accuracy, and a change that is one copy."""

import pytest
import torch
import uvc_kernels
from accuracy import with_gradients
from on_triton import DEVICE, DTYPES, check, forced, interpreted, random
from uvc_kernels import fused
from uvc_kernels.mlp import ACTIVATIONS
from uvc_kernels.triton import attention_core, fused_matmul

KERNELS = (
    (fused_matmul, ("_transpose", "_onto", "_back", "_grads", "_spread")),
    (attention_core, ("_forward", "_backward")),
)


def slow(*parameters):
    return pytest.param(*parameters, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])


def mlp_inputs(hidden, shape=(2, 17), width=24, out=64, biases=True, gated=False):
    x, weight, bias = random(*shape, width), random(hidden, width) * 0.3, random(hidden)
    gate = [random(hidden, width) * 0.3, random(hidden) if biases else None] if gated else []
    return [x, weight, bias if biases else None, random(out, hidden), random(out) if biases else None, *gate]


def some(count, hidden):
    return torch.randperm(hidden) < count


def run_mlp(envelope, activation="gelu"):
    return lambda *tensors: fused.mlp_fused(*tensors[:5], envelope, activation, *tensors[5:])


def attention_inputs(tokens, heads, dims, batch=1, width=24, out=64, biases=True):
    A = heads * dims
    x, qkv, proj = random(batch, tokens, width), random(3 * A, width) * 0.3, random(out, A)
    return [x, qkv, random(3 * A) if biases else None, proj, random(out) if biases else None]


def masks(heads, dims, keep=0.5):
    """Heads of other q/k dims than v dims; the first kept head has no q/k dim, the last head is removed."""
    qk, v = (torch.rand(heads, dims) < keep for _ in range(2))
    v[0, 0], qk[0] = True, False
    if heads > 1:
        v[-1] = False
    return qk, v


def attend(envelope, scale=0.25):
    return lambda *tensors: fused.attention_fused(*tensors, envelope, scale)


def test_attention_and_mlp_can_go_this_way_with_their_own_records():
    qk, v = masks(3, 20)
    kept = uvc_kernels.kept_heads(qk, v, DEVICE), uvc_kernels.kept_neurons(some(30, 90), DEVICE)
    envelopes = fused.envelope_heads(qk, v, DEVICE), fused.envelope_neurons(kept[1].whole >= 0, DEVICE)
    calls = [
        ("attention", attention_inputs(17, 3, 20), 0, 0.25, ()),
        ("mlp", mlp_inputs(90), 1, "gelu", (None, None)),
        ("mlp", mlp_inputs(90, gated=True), 1, "silu", ()),
    ]
    for op, tensors, which, how, absent in calls:
        way, direct = fused.WAYS[op], getattr(fused, f"{op}_fused")
        args = kept[which], envelopes[which], how, absent
        # As dispatch calls it, with every argument of the public op: no packed weights, no recomputing.
        one = forced(lambda *t, f=way, a=args: f(*t[:5], a[0], a[2], *t[5:], *a[3], None, False))
        other = forced(lambda *t, f=direct, a=args: f(*t[:5], a[1], a[2], *t[5:]))
        tensors = [t.float().to(DEVICE) for t in tensors]
        found, expected = with_gradients(one, tensors), with_gradients(other, tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for record, envelope in zip(kept, envelopes, strict=True):
        assert torch.equal(fused._envelope_of(record).flat, envelope.flat)
        assert fused._envelope_of(record) is fused._envelope_of(record)


def test_an_envelope_lives_as_long_as_its_record():
    kept = uvc_kernels.kept_neurons(some(30, 90), DEVICE)
    before = len(fused._envelopes)
    with torch.inference_mode():
        assert not fused._envelope_of(kept).flat.is_inference()
    assert len(fused._envelopes) == before + 1
    del kept
    assert len(fused._envelopes) == before


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(0, torch.float32), (7, torch.bfloat16), (100, torch.float16)]
    + [slow(count, dtype) for count in (0, 1, 7, 100) for dtype in DTYPES],
    ids=str,
)
def test_any_number_of_neurons_is_as_exact_as_plain_torch(count, dtype):
    envelope = fused.envelope_neurons(some(count, 110), DEVICE)
    check(run_mlp(envelope), mlp_inputs(110), dtype)


@pytest.mark.parametrize(
    ("activation", "gated"),
    [("gelu", False), ("silu", True)]
    + [slow(activation, gated) for activation in ACTIVATIONS for gated in (False, True)],
)
def test_every_activation_is_as_exact_as_plain_torch(activation, gated):
    envelope = fused.envelope_neurons(some(70, 90), DEVICE)
    check(run_mlp(envelope, activation), mlp_inputs(90, (3, 50), gated=gated), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_gated_mlp_in_half_precision_is_as_exact_as_plain_torch(dtype):
    envelope = fused.envelope_neurons(some(150, 200), DEVICE)
    check(run_mlp(envelope, "silu"), mlp_inputs(200, (3, 50), width=136, out=200, gated=True), dtype)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((17, dtype) for dtype in DTYPES), *(slow(n, dtype) for n in (1, 50, 197, 577) for dtype in DTYPES)],
    ids=str,
)
def test_ragged_attention_is_as_exact_as_plain_torch(tokens, dtype):
    envelope = fused.envelope_heads(*masks(4, 24, 0.6), DEVICE)
    check(attend(envelope), attention_inputs(tokens, 4, 24, batch=4), dtype)


@pytest.mark.parametrize(
    ("heads", "dims"), [(12, 12), *(slow(*sizes) for sizes in ((1, 64), (2, 128), (3, 20), (16, 8)))]
)
def test_any_number_of_heads_and_dims_is_as_exact_as_plain_torch(heads, dims):
    envelope = fused.envelope_heads(*masks(heads, dims, 0.8), DEVICE)
    check(attend(envelope), attention_inputs(17, heads, dims, batch=2), torch.float32)


def test_missing_biases_are_fine():
    check(run_mlp(fused.envelope_neurons(some(5, 9), DEVICE)), mlp_inputs(9, biases=False), torch.float32)
    tensors = mlp_inputs(9, biases=False, gated=True)
    check(run_mlp(fused.envelope_neurons(some(5, 9), DEVICE)), tensors, torch.float32)
    envelope = fused.envelope_heads(*masks(3, 8), DEVICE)
    check(attend(envelope), attention_inputs(9, 3, 8, biases=False), torch.float32)


def test_many_tokens_are_summed_in_slices_that_add_up():
    tensors = mlp_inputs(100, (2, 200), width=8)
    step = fused_matmul._blocks("plain", torch.float32)[2]
    assert 400 // step // 8 > 1, "the tokens are cut into slices"
    check(run_mlp(fused.envelope_neurons(some(90, 100), DEVICE)), tensors, torch.float32)


def test_an_empty_batch_and_an_empty_structure_leave_zero_gradients():
    envelope = fused.envelope_neurons(some(5, 9), DEVICE)
    tensors = [t.float() for t in mlp_inputs(9, (0, 17))]
    out, *grads = with_gradients(forced(run_mlp(envelope)), tensors)
    assert out.shape == (0, 17, 64) and all(torch.count_nonzero(grad) == 0 for grad in grads)
    none = torch.zeros(3, 8, dtype=torch.bool)
    tensors = [t.float() for t in attention_inputs(9, 3, 8)]
    out, *grads = with_gradients(forced(attend(fused.envelope_heads(none, none, DEVICE))), tensors)
    assert torch.equal(out, tensors[4].expand_as(out))
    assert all(torch.count_nonzero(grad) == 0 for grad in grads[:4])


def test_gradients_of_what_is_removed_are_exactly_zero():
    envelope = fused.envelope_neurons(some(20, 40), DEVICE)
    tensors = [t.float() for t in mlp_inputs(40, gated=True)]
    _, _, fc1, bias, fc2, _, gate, gate_bias = with_gradients(forced(run_mlp(envelope)), tensors)
    removed = envelope.whole < 0
    for grad in (fc1, bias, gate, gate_bias, fc2.t()):
        assert torch.count_nonzero(grad[removed]) == 0
        assert grad[~removed].abs().sum() > 0
    heads = fused.envelope_heads(*masks(3, 16), DEVICE)
    tensors = [t.float() for t in attention_inputs(37, 3, 16)]
    _, _, qkv, bias, proj, _ = with_gradients(forced(attend(heads)), tensors)
    for grad, whole in ((qkv, heads.whole_rows), (bias, heads.whole_rows), (proj.t(), heads.whole_columns)):
        assert torch.count_nonzero(grad[whole < 0]) == 0
        assert grad[whole >= 0].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_repeats_are_bit_equal(dtype):
    layer = run_mlp(fused.envelope_neurons(some(33, 40), DEVICE), "silu")
    tensors = [t.to(dtype) for t in mlp_inputs(40, (2, 150), gated=True)]
    heads = attend(fused.envelope_heads(*masks(3, 16), DEVICE))
    others = [t.to(dtype) for t in attention_inputs(33, 3, 16)]
    for function, given in ((layer, tensors), (heads, others)):
        first, second = (with_gradients(forced(function), given) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def launches(monkeypatch):
    """Every launch as (kernel, grid, arguments): shapes and places of tensors, all numbers and options."""
    made = []

    def recorder(name, kernel):
        class Recorder:
            def __getitem__(self, grid):
                def run(*arguments, **options):
                    shown = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
                    indices = [a.data_ptr() for a in arguments if getattr(a, "dtype", None) == torch.int32]
                    made.append((name, grid, shown, indices, options))
                    return kernel[grid](*arguments, **options)

                return run

        return Recorder()

    for module, names in KERNELS:
        for name in names:
            monkeypatch.setattr(module, name, recorder(name, getattr(module, name)))
    return made


def layers():
    """The two layers, each with its inputs, its envelope and the masks of other structures."""
    neurons = fused.envelope_neurons(some(33, 40), DEVICE)
    heads = fused.envelope_heads(*masks(3, 16), DEVICE)
    none = torch.zeros(3, 16, dtype=torch.bool)
    gated = [t.float() for t in mlp_inputs(40, gated=True)]
    tensors = [t.float() for t in attention_inputs(37, 3, 16)]
    return [
        (run_mlp(neurons), gated, neurons, [(some(n, 40),) for n in (3, 40, 0, 33)]),
        (attend(heads), tensors, heads, [masks(3, 16, 0.9), (~none, ~none), (none, none), masks(3, 16)]),
    ]


@pytest.mark.parametrize("layer", [0, 1], ids=["mlp", "attention"])
def test_a_changed_structure_repeats_the_very_same_launches(layer, launches):
    function, tensors, envelope, others = layers()[layer]
    with_gradients(forced(function), tensors)
    first = list(launches)
    assert len(first) >= 7
    for given in others:
        launches.clear()
        envelope.write(*given)
        found = with_gradients(forced(function), tensors)
        assert launches == first
        with uvc_kernels.backend("reference"):
            wanted = with_gradients(function, tensors)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("layer", [0, 1], ids=["mlp", "attention"])
def test_one_captured_graph_serves_every_structure(layer):
    function, tensors, envelope, others = layers()[layer]
    leaves = [t.detach().requires_grad_() for t in tensors]
    run = forced(function)
    cotangent = torch.randn_like(run(*leaves))

    def step():
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for given in others:
        envelope.write(*given)
        graph.replay()
        replayed = [t.clone() for t in results]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_a_structure_that_changes_between_the_passes_is_an_error():
    for function, tensors, envelope, others in layers():
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = forced(function)(*leaves)
        envelope.write(*others[0])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_nothing_is_read_from_the_device(monkeypatch):
    def refuse(*_):
        raise AssertionError("the host waits for the device")

    for function, tensors, _, _ in layers():
        expected = with_gradients(forced(function), tensors)
        for name in ("tolist", "item", "cpu", "__bool__", "__index__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = forced(function)(*leaves)
        out.backward(torch.ones_like(out))
        monkeypatch.undo()
        assert torch.equal(out, expected[0])


def test_compiles_as_one_graph_that_also_survives():
    for function, tensors, envelope, others in layers():
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with uvc_kernels.backend("triton"):
            with_gradients(compiled, tensors)
            envelope.write(*others[0])
            with torch._dynamo.config.patch(error_on_recompile=True):
                found = with_gradients(compiled, tensors)
            expected = with_gradients(function, tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@interpreted
@pytest.mark.parametrize("kind", [slow("plain"), "gated", "no biases"])
def test_opcheck_passes(kind):
    x, fc1, bias1, fc2, bias2, *gate = mlp_inputs(9, (2, 3), 8, 16, kind != "no biases", kind == "gated")
    envelope = fused.envelope_neurons(torch.ones(9, dtype=torch.bool))
    tensors = (x, fc1, bias1, fc2, bias2, *(gate or (None, None)))
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    op = torch.ops.uvc_kernels.mlp_fused.default
    torch.library.opcheck(op, (*leaves, *envelope[1:], "silu"))
    detached = [None if t is None else t.detach() for t in leaves]
    out, *saved = op(*detached, *envelope[1:], "silu")
    there = sum(1 << i for i, t in enumerate(detached) if t is not None)
    backward = torch.ops.uvc_kernels.mlp_fused_backward.default
    for needs in (there, there & 0b0001001):
        torch.library.opcheck(
            backward, (torch.ones_like(out), *detached, *envelope[1:], "silu", *saved, needs)
        )


@interpreted
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck_of_attention_passes(biases):
    mask = torch.ones(2, 8, dtype=torch.bool)
    envelope = fused.envelope_heads(mask, mask)
    tensors = attention_inputs(5, 2, 8, width=8, out=16, biases=biases)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    op = torch.ops.uvc_kernels.attention_fused.default
    torch.library.opcheck(op, (*leaves, *envelope[1:], 0.5))
    detached = [None if t is None else t.detach() for t in leaves]
    out, *saved = op(*detached, *envelope[1:], 0.5)
    backward = torch.ops.uvc_kernels.attention_fused_backward.default
    for needs in (0b11111, 0b01001) if biases else (0b01011, 0b01000):
        torch.library.opcheck(backward, (torch.ones_like(out), *detached, *envelope[1:], 0.5, *saved, needs))


@interpreted
@pytest.mark.parametrize("kind", [slow("mlp"), "gated", "attention"])
def test_gradcheck_passes(kind):
    if kind == "attention":
        function = attend(fused.envelope_heads(*masks(2, 3)))
        tensors = attention_inputs(3, 2, 3, width=8, out=8)
    else:
        function = run_mlp(fused.envelope_neurons(some(4, 6)), "silu")
        tensors = mlp_inputs(6, (2,), 8, 8, gated=kind == "gated")
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(forced(function), leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", [0, 1, 2, slow(3), slow(4), slow(5), slow(6)])
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen):
    for function, tensors, _, _ in layers():
        whole = with_gradients(forced(function), tensors)[1:]
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
        out = forced(function)(*leaves)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(cotangent.bfloat16().to(out))
        for i, (leaf, grad) in enumerate(zip(leaves, whole, strict=True)):
            assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, a: m[1].write(torch.ones(41, dtype=torch.bool)), "the envelope is of 40 neurons"),
        (lambda m, a: a[1].write(*[torch.ones(3, 8, dtype=torch.bool)] * 2), r"of \[3, 16\] heads and dims"),
        (lambda m, a: fused.mlp_fused(*m[0][:5], m[1], "softplus"), "unknown activation 'softplus'"),
        (lambda m, a: fused.mlp_fused(m[0][0], m[0][1][1:], *m[0][2:5], m[1]), "fc1_weight must be"),
        (lambda m, a: fused.mlp_fused(m[0][0].half(), *m[0][1:5], m[1]), "one dtype"),
        (
            lambda m, a: fused.attention_fused(*a[0][:3], a[0][3][:-1], None, a[1], 1.0),
            "multiple of 8, got 63",
        ),
        (lambda m, a: fused.attention_fused(a[0][0][0], *a[0][1:], a[1], 1.0), r"x must be \[batch"),
    ],
    ids=["neurons", "heads", "activation", "weight", "dtype", "width", "dims"],
)
def test_what_does_not_fit_is_one_clear_line(call, message):
    (_, gated, neurons, _), (_, tensors, heads, _) = layers()
    with uvc_kernels.backend("triton"), pytest.raises(ValueError, match=message) as caught:
        call((gated, neurons), (tensors, heads))
    assert "\n" not in str(caught.value)

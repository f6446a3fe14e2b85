"""When Triton serves: on request in the interpreter, by default only where its self-check passed."""

import subprocess
import sys
import warnings

import pytest
import torch
import uvc_kernels
from on_triton import DEVICE
from uvc_kernels import _dispatch, self_check
from uvc_kernels.triton import launch

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:.*runs on plain PyTorch")
@pytest.mark.parametrize("op", self_check.EXAMPLES)
def test_the_interpreter_never_serves_unasked(op):
    assert uvc_kernels.select(op, CPU, torch.float32) in ("cpu", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", self_check.EXAMPLES)
def test_every_op_passes_its_self_check(op, dtype):
    assert self_check.fault(op, "triton", torch.device(DEVICE), dtype) is None


@pytest.fixture
def a_faulty_kernel(monkeypatch):
    """Stands in for a GPU provider of group_scores, one percent off."""

    def wrong(a, b, dims):
        return self_check.group_scores.__globals__["group_scores_reference"](a, b, dims) * 1.01

    made = _dispatch._Implementation(wrong, "cpu", frozenset({torch.float32}))
    monkeypatch.setitem(_dispatch._implementations, ("group_scores", "cuda"), made)
    monkeypatch.setattr(_dispatch, "_proofs", {})


def test_a_kernel_that_fails_its_self_check_is_not_used_and_that_is_said_once(a_faulty_kernel):
    with pytest.warns(RuntimeWarning, match="the cuda kernel fails its self-check on cpu .*times what is"):
        assert not _dispatch._proven("group_scores", "cuda", CPU, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _dispatch._proven("group_scores", "cuda", CPU, torch.float32)
    with uvc_kernels.backend("cuda"):
        assert uvc_kernels.select("group_scores", CPU, torch.float32) == "cuda"


@pytest.mark.filterwarnings("ignore:.*runs on plain PyTorch")
@pytest.mark.parametrize("provider", ["triton", "cuda"])
@pytest.mark.parametrize("proven", [True, False])
def test_on_a_gpu_a_kernel_serves_only_when_its_self_check_passed(monkeypatch, proven, provider):
    made = _dispatch._Implementation(len, "cuda", frozenset({torch.float32}))
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    monkeypatch.setattr(_dispatch, "_implementations", {("group_scores", provider): made})
    monkeypatch.setattr(_dispatch, "_loaders", {})
    monkeypatch.setattr(_dispatch, "_proven", lambda *_: proven)
    found = uvc_kernels.select("group_scores", torch.device("cuda"), torch.float32)
    assert found == (provider if proven else "reference")


def test_a_kernel_that_raises_in_its_self_check_is_not_used(a_faulty_kernel, monkeypatch):
    def broken(a, b, dims):
        raise OSError("no driver\nat line 1")

    made = _dispatch._Implementation(broken, "cpu", frozenset({torch.float32}))
    monkeypatch.setitem(_dispatch._implementations, ("group_scores", "cuda"), made)
    with pytest.warns(RuntimeWarning, match="is not used: OSError: no driver$"):
        assert not _dispatch._proven("group_scores", "cuda", CPU, torch.float32)


def test_the_self_check_runs_while_torch_compile_traces(a_faulty_kernel):
    def doubled_where_proven(t):
        return 2 * t if _dispatch._proven("group_scores", "cuda", CPU, torch.float32) else t

    compiled = torch.compile(doubled_where_proven, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="self-check"):
        found = compiled(torch.ones(3))
    assert torch.equal(found, torch.ones(3))


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
sys.meta_path.insert(0, Without())
import torch, uvc_kernels
try:
    with uvc_kernels.backend("triton"):
        uvc_kernels.select("mlp", torch.device("cuda"), torch.float32)
except RuntimeError as error:
    print(error)
"""


def test_without_triton_asking_for_it_is_one_clear_line():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    wanted = "backend 'triton' was asked for mlp but cannot run it: triton is not installed (No module named"
    assert done.stdout.startswith(wanted) and done.stdout.count("\n") == 1, done.stderr


def test_a_capture_asks_for_no_pinned_memory_and_each_of_its_tables_is_its_own(monkeypatch):
    class Gpu:
        type = "cuda"

    class Pinned(torch.Tensor):
        def to(self, device, non_blocking=False):
            return self.as_subclass(torch.Tensor)

    state = {"capturing": False}

    def pinned(count):
        assert not state["capturing"]
        return torch.empty(count, dtype=torch.int64).as_subclass(Pinned)

    monkeypatch.setattr(launch, "_pinned", pinned)
    monkeypatch.setattr(launch, "_spare", {})
    monkeypatch.setattr(launch, "_captured", [])
    monkeypatch.setattr(launch, "_addresses", lambda fields, device: torch.tensor(fields).flatten())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    for _ in range(2):
        launch.addresses(((1, 2), (3, 4)), Gpu())
    state["capturing"] = True
    one, other = launch.addresses(((5, 6), (7, 8)), Gpu()), launch.addresses(((9, 9), (9, 9)), Gpu())
    assert one.tolist() == [5, 6, 7, 8] and other.tolist() == [9] * 4 and len(launch._captured) == 2
    with pytest.raises(RuntimeError, match="run the step first"):
        launch.addresses(((1, 2), (3, 4)), Gpu())

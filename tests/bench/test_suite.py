"""`pytest bench/` where things are missing: what can run runs, what cannot is named with its reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hidden import hide

from uvc.bench.rows import read

ROOT = Path(__file__).parents[2]


def suite(tmp_path, *options, hidden=(), tools=True):
    """A run of the suite in a fresh interpreter without some packages, and without any tool on the PATH."""
    (tmp_path / "sitecustomize.py").write_text(hide(hidden))
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME", "UVC_BACKEND")}
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = kept | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    if not tools:
        environment["PATH"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """One layer and one op in a container without compilers, GPU, triton and torch-pruning."""
    folder = tmp_path_factory.mktemp("bare")
    run = suite(
        folder, "-k", "tiny and forward and 0.5 and (mlp or gather)", "--quick", "--results",
        str(folder / "results"), hidden=("triton", "torch_pruning"), tools=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    return folder, run.stdout.splitlines()


def test_what_is_missing_is_named_with_its_reason(bare):
    left = {line.split(": ")[1]: line.split(": ", 2)[2] for line in bare[1] if line.startswith("left out: ")}
    assert {"compiled", "triton", "cuda"} <= set(left)
    assert "compiler" in left["compiled"].lower() and all(left.values())


def test_what_can_run_leaves_rows(bare):
    folder, _ = bare
    (path,) = (folder / "results").glob("*/kernels.csv")
    rows = read(path)
    layer, op = ([row for row in rows if (row.batch > 0) == yes] for yes in (True, False))
    assert {"dense", "masked", "pack_torch", "compacted", "on_the_fly"} == {row.variant for row in layer}
    assert {"plain_torch", "kernel"} == {row.variant for row in op}
    assert all(row.ms > 0 and row.cap >= 1 and row.commit and "torch" in row.versions for row in rows)


def test_the_table_is_printed_last(bare):
    _, lines = bare
    table = max(i for i, line in enumerate(lines) if line.startswith("tiny mlp forward, keep 0.5"))
    passed = [i for i, line in enumerate(lines) if " passed" in line]
    assert all(i < table for i in passed)
    assert [line for line in lines if line][-1].startswith("of roof: least possible time")


def test_a_gpu_that_is_not_here_is_one_line(tmp_path):
    run = suite(tmp_path, "--device", "cuda", "-k", "test_layer and deit_tiny and mlp and forward and 0.5")
    if run.returncode == 0:
        pytest.skip("there is a GPU")
    assert run.returncode == 2 and "torch sees no GPU here; leave the option out" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr

"""The installed packages: importable anywhere, stable ABI only, silent at import, alive without compiler."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import uvc_kernels
from uvc_kernels import _dispatch

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(
    _dispatch.extension_error is not None, reason="the extension is not built"
)


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a fresh interpreter that sees only the installation."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UVC_"))} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_both_packages_and_the_command_are_installed_under_their_names():
    distribution = metadata.distribution("uvc-vit")
    scripts = {script.name: script.value for script in distribution.entry_points}
    assert scripts["uvc"] == "uvc.cli:main"
    assert any(requirement.startswith("torch>=2.10") for requirement in distribution.requires)


def test_the_public_names_of_uvc_kernels_are_these():
    assert uvc_kernels.__all__ == sorted(uvc_kernels.__all__)
    assert set(uvc_kernels.__all__) == {
        "KeptHeads", "KeptNeurons", "Positions", "attention", "attention_packing", "attention_with_positions",
        "backend", "by_preference", "gather", "group_scores", "kept_heads", "kept_neurons", "kernel_serves",
        "mlp", "mlp_packing", "packs_ahead", "prox_shrink", "select", "turn_of",
    }  # fmt: skip


@needs_extension
def test_imports_work_from_outside_the_repository(tmp_path):
    done = python("import uvc_kernels._C, uvc; print(uvc_kernels._C.__file__)", tmp_path)
    assert done.stdout.strip().endswith("_C.abi3.so"), done.stderr


@needs_extension
def test_the_extension_uses_the_stable_abi_only():
    import uvc_kernels._C as extension

    binary = Path(extension.__file__).read_bytes()
    assert b"torch_call_dispatcher" in binary
    # Mangled names of at:: and c10:: would tie the build to one version of torch.
    assert not [name for name in (b"_ZN2at", b"_ZN3c10", b"_ZNK2at", b"_ZNK3c10") if name in binary]


def test_importing_changes_nothing_and_asks_no_device(tmp_path):
    code = """
import os, sys, torch
environment, state, threads = dict(os.environ), torch.get_rng_state(), torch.get_num_threads()
modules = set(sys.modules)
import uvc_kernels
assert dict(os.environ) == environment and torch.equal(torch.get_rng_state(), state)
assert torch.get_num_threads() == threads and not torch.cuda.is_initialized()
assert "triton" not in set(sys.modules) - modules
print("quiet")
"""
    done = python(code, tmp_path)
    assert done.stdout.strip() == "quiet" and done.stderr == ""


def test_without_the_extension_every_op_runs_and_warns_once(tmp_path):
    code = """
import sys, warnings
sys.modules["uvc_kernels._C"] = None
import torch, uvc_kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, mask = torch.ones(1, 2, 4), torch.ones(2, 2, dtype=torch.bool)
    kept, neurons = uvc_kernels.kept_heads(mask, mask), uvc_kernels.kept_neurons(mask[0].repeat(2))
    for _ in range(2):
        uvc_kernels.attention(x, torch.ones(12, 4), None, torch.ones(4, 4), None, kept, 1.0)
        uvc_kernels.mlp(x, torch.ones(4, 4), None, torch.ones(4, 4), None, neurons)
        uvc_kernels.group_scores([x[0]], [x[0]], [0])
        uvc_kernels.prox_shrink([x[0]], torch.ones(2), [0])
print(len(caught), all("compiler" in str(w.message) for w in caught))
"""
    done = python(code, tmp_path)
    assert done.stdout.strip() == "4 True", done.stderr


def test_without_a_compiler_the_build_goes_on_with_one_warning():
    environment = {**os.environ, "CXX": "/nonexistent/c++"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1] == metadata.version("uvc-vit")
    assert done.stderr.count("no working C++ compiler") == 1 and "Install g++" in done.stderr

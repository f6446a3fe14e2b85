"""The law of the house: a module imports only modules to its left, no files import one another in a circle,
and `import uvc` needs none of the extras.
"""

import ast
import subprocess
import sys

import pytest
from hidden import hide
from imports import ROOT, cycles, graph, levels, sources

import uvc

# From left to right; what stands in one row may not import one another, but for files of one room.
LAYERS = [
    ["uvc_kernels"],
    ["uvc.environment", "uvc.io.files", "uvc.settings"],
    ["uvc.config"],
    ["uvc.recipes", "uvc.layers", "uvc.models"],
    ["uvc.structure"],
    ["uvc.elastic"],
    ["uvc.compaction"],
    ["uvc.costs"],
    ["uvc.io"],
    ["uvc.constraints", "uvc.latency_table"],
    ["uvc.solver"],
    ["uvc.training"],
    ["uvc"],
    ["uvc.app"],
    ["uvc.bench"],
    ["uvc.cli"],
    ["uvc.__main__"],
]
PUBLIC = [
    "Structure",
    "UVCAttention",
    "UVCMlp",
    "apply_structure",
    "compact",
    "compress",
    "convert",
    "cost",
    "families",
    "load",
    "load_weights",
    "push_to_hub",
    "save",
    "set_budget",
    "structure_of",
]


def place(module: str) -> tuple[int, str]:
    """The row of `LAYERS` that a module stands in, and the entry with the longest name that holds it."""
    fits = [(len(n), i, n) for i, row in enumerate(LAYERS) for n in row if f"{module}.".startswith(f"{n}.")]
    return max(fits)[1:]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports that do not go to the left."""
    found = []
    for module, others in edges.items():
        row, room = place(module)
        for other in others:
            other_row, other_room = place(other)
            if other_room != room and other_row >= row:
                found.append(f"{module} imports {other}")
    return sorted(found)


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph between the modules and folders at the top of `uvc/`; `__main__` only starts the cli."""
    found: dict[str, set[str]] = {}
    for module, others in edges.items():
        if module.startswith("uvc.") and module != "uvc.__main__":
            room = ".".join(module.split(".")[:2])
            tops = {".".join(other.split(".")[:2]) for other in others if other.startswith("uvc.")}
            found.setdefault(room, set()).update(tops - {room})
    return found


def test_a_module_imports_only_modules_to_its_left():
    assert upward(graph(sources())) == []


def test_no_files_import_one_another_in_a_circle():
    edges = graph(sources())
    print(f"{len(edges)} files, cycles: {cycles(edges) or 'none'}")
    assert cycles(edges) == []


def test_the_top_of_uvc_has_few_rooms_on_few_levels():
    edges = rooms(graph(sources()))
    print(f"{len(edges)} rooms on {levels(edges)} levels")
    assert cycles(edges) == [] and len(edges) <= 18 and levels(edges) <= 9


def broken(tmp_path, changes: dict[str, str]) -> dict[str, set[str]]:
    """The import graph with some files replaced by others."""
    files = dict(sources())
    for module, text in changes.items():
        path = tmp_path / (module + ".py")
        path.write_text(text)
        files[module] = path
    return graph(files)


def test_an_upward_import_is_seen(tmp_path):
    edges = broken(tmp_path, {"uvc.structure": "def f():\n    from uvc.solver import step\n"})
    assert upward(edges) == ["uvc.structure imports uvc.solver.step"]


def test_a_circle_of_files_is_seen(tmp_path):
    edges = broken(tmp_path, {"uvc.solver.state": "from . import step\n"})
    assert any({"uvc.solver.state", "uvc.solver.step"} <= set(circle) for circle in cycles(edges))


@pytest.mark.parametrize(
    "text",
    [
        'NAME = "uvc.solver.step"\n',
        'from importlib import import_module\nimport_module(f"uvc.solver.{name}")\n',
    ],
    ids=["in a name", "in a name put together"],
)
def test_a_circle_through_a_string_import_is_seen(tmp_path, text):
    edges = broken(tmp_path, {"uvc.solver.state": text})
    assert any({"uvc.solver.state", "uvc.solver.step"} <= set(circle) for circle in cycles(edges))


@pytest.mark.parametrize("module", sources())
def test_kernels_and_layers_know_no_training_data_or_command_line(module):
    path = sources()[module]
    if place(module) > place("uvc.costs"):
        return
    heavy = {"sklearn", "torchvision", "tensorboard", "matplotlib", "click", "rich"}
    names = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {
        node.module or ""
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not {name.split(".")[0] for name in names} & heavy


def test_the_public_names_are_pinned():
    assert uvc.__all__ == PUBLIC == sorted(PUBLIC)
    assert all(getattr(uvc, name) for name in PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        uvc.nothing  # noqa: B018


EXTRAS = ("accelerate", "triton", "sklearn", "tensorboard", "matplotlib", "click", "rich")
FRESH = """
import sys, warnings
warnings.simplefilter("error")
import uvc
assert not set({extras}) & {{name.split(".")[0] for name in sys.modules}}
import torch
from uvc_kernels import _dispatch, autotune
# Importing registers, and neither loads what is provided on demand nor checks or measures anything.
assert not {{"uvc_kernels.triton", "uvc_kernels.cuda"}} & set(sys.modules)
assert _dispatch._loaders.keys() == {{"triton", "cuda", "cuda-host"}}
assert not _dispatch._proofs and not autotune._known
from timm.models.vision_transformer import VisionTransformer
model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=2)
uvc.apply_structure(model, uvc.Structure.random(model, 0.5))
assert model(torch.randn(1, 3, 8, 8)).isfinite().all()
assert not torch.cuda.is_initialized()
"""


def test_a_fresh_interpreter_imports_and_runs_without_the_extras():
    code = hide(EXTRAS) + FRESH.format(extras=EXTRAS)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert subprocess.run(
        [sys.executable, "-c", code.replace("import uvc", "import rich")], cwd=ROOT, capture_output=True
    ).returncode

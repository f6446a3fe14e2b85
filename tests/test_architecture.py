"""The law of the house: a room imports only rooms to its left; `import uvc` needs none of the extras."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hidden import hide

import uvc

ROOT = Path(__file__).parent.parent

# Each room, from left to right, with the modules that make it up.
ROOMS = [
    ["uvc_kernels"],
    ["uvc.layers", "uvc.models"],
    ["uvc.structure"],
    ["uvc.budget"],
    ["uvc.solver", "uvc.config"],
    ["uvc"],
    ["uvc.cli"],
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
    "load",
    "save",
    "structure_of",
]


def room_of(module: str) -> int:
    """The room with the longest name that `module` lies in."""
    fits = [
        (len(name), i) for i, room in enumerate(ROOMS) for name in room if f"{module}.".startswith(f"{name}.")
    ]
    return max(fits)[1]


def sources() -> dict[str, Path]:
    """Every Python file of the two packages by its module name."""
    found = {}
    for folder, package in (("kernels", "uvc_kernels"), ("uvc", "uvc")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """The absolute names of what a file imports, anywhere in it, from our own packages."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            # `from uvc import x` imports the module x when there is one.
            names |= {
                f"{source}.{a.name}" if f"{source}.{a.name}" in sources() else source for a in node.names
            }
    return {name for name in names if name.split(".")[0] in ("uvc", "uvc_kernels")}


@pytest.mark.parametrize("module", [name for name in sources() if name != "uvc"])
def test_a_room_imports_only_rooms_to_its_left(module):
    for name in imports(module, sources()[module]):
        assert room_of(name) <= room_of(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", sources())
def test_kernels_and_layers_know_no_training_data_or_command_line(module):
    path = sources()[module]
    if room_of(module) > room_of("uvc.budget"):
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


def test_the_law_sees_a_breach(tmp_path):
    breach = tmp_path / "structure.py"
    breach.write_text("def f():\n    from uvc.solver import step\n    from . import compact\n")
    assert imports("uvc.structure", breach) == {"uvc.solver.step", "uvc.compact"}
    assert room_of("uvc.solver.step") > room_of("uvc.structure") < room_of("uvc.compact")


def test_the_public_names_are_pinned():
    assert uvc.__all__ == PUBLIC == sorted(PUBLIC)
    assert all(getattr(uvc, name) for name in PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        uvc.nothing  # noqa: B018


EXTRAS = ("triton", "sklearn", "tensorboard", "matplotlib", "click", "rich")
FRESH = """
import sys, warnings
warnings.simplefilter("error")
import uvc
assert not set({extras}) & {{name.split(".")[0] for name in sys.modules}}
import torch
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

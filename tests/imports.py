"""The import graph of `uvc` and `uvc_kernels`, read from the sources: every import anywhere in a file, and
names of modules in strings, as `importlib.import_module` takes them.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"uvc_kernels": "kernels", "uvc": "uvc"}


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every Python file of the two packages by its module name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """For every module, the other modules among `files` that it imports."""
    return {name: imports(name, path, files) - {name} for name, path in files.items()}


def imports(module: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules among `known` that a file names in an import or in a string."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            # `from uvc import x` imports the module x when there is one.
            named = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in known else source for name in named}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found.add(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for text in node.args:
                if isinstance(text, ast.JoinedStr) and isinstance(text.values[0], ast.Constant):
                    # f"uvc_kernels.triton.{name}" may name any module of that package.
                    start = text.values[0].value.rstrip(".")
                    found |= {name for name in known if name.rpartition(".")[0] == start}
    return found & set(known)


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import one another, each sorted (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in edges[name]:
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in edges:
        if name not in order:
            visit(name)
    return sorted(found)


def levels(edges: Mapping[str, set[str]]) -> int:
    """How many modules the longest chain of imports passes through, in a graph without cycles."""
    depth: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max(map(of, edges[name]), default=0)
        return depth[name]

    return max(map(of, edges))

"""What MkDocs does to the pages: links out of docs/ become names of files; every error message is listed."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "<!-- every message -->"
ERRORS = {"ValueError", "RuntimeError", "UsageError", "BadSetting"}


def on_page_markdown(markdown: str, **_) -> str:
    """The text of a page."""
    markdown = re.sub(r"\[([^]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", markdown)
    return markdown.replace(MARK, "\n".join(_listed())) if MARK in markdown else markdown


def messages() -> dict[str, list[str]]:
    """What uvc and its kernels say when they refuse, by file; what is filled in stands as `...`."""
    found: dict[str, list[str]] = {}
    for path in (path for room in ("uvc", "kernels") for path in sorted((ROOT / room).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in ast.walk(tree):
            if not isinstance(scope, ast.FunctionDef):
                continue
            # A text that was put together in the line before.
            names = {
                node.targets[0].id: _text(node.value)
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            for node in ast.walk(scope):
                call = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(call, ast.Call) and _name(call.func) in ERRORS:
                    texts = [_text(a) or names.get(getattr(a, "id", ""), "") for a in call.args]
                    text = " ".join(": ".join(filter(None, texts)).split())
                    known = found.setdefault(path.relative_to(ROOT).as_posix(), [])
                    if len(re.findall(r"[A-Za-z]{3,}", text)) > 1 and text not in known:
                        known.append(text)
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h")):
        for call in re.findall(r"\bcheck\((.*?)\);", path.read_text(encoding="utf-8"), re.DOTALL):
            start, *pieces = re.split(r'"([^"]*)"', call)
            text = ("..." if start.rstrip().endswith("+") else "") + "...".join(pieces[::2])
            known = found.setdefault(path.relative_to(ROOT).as_posix(), [])
            if pieces and text not in known:
                known.append(text)
    return {path: texts for path, texts in found.items() if texts}


def _listed() -> list[str]:
    lines = []
    for path, texts in messages().items():
        lines += ["", f"`{path}`", ""] + [f"- ``{text}``" for text in texts]
    return lines


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _text(node: ast.expr) -> str:
    """The text of a literal, with `...` for what is filled in; "" where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return _text(node.body) or _text(node.orelse)
    return ""

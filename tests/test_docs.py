"""The documentation site builds without a warning and holds every command, name and message."""

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import uvc
from uvc.cli import cli

ROOT = Path(__file__).parent.parent
SITE = ("mkdocs", "material", "mkdocstrings", "mkdocs_click")


def hooks():
    """What the build does to pages."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(path: Path) -> str:
    """The text of a page, without tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", path.read_text(encoding="utf-8"))).split())


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SITE), reason="pip install -e '.[docs]'"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr[-2000:]
    pages = {path.parent.name: text_of(path) for path in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= pages.keys()
    for name, command in cli.commands.items():
        assert f"uvc {name}" in pages["cli"], name
        for option in command.params:
            assert option.opts[0] in pages["cli"] or option.param_type_name == "argument", option.opts
    for name in uvc.__all__:
        assert f"{name}" in pages["api"], name
    for said in ("holds a run already", "is below ..., the smallest reachable ... budget of"):
        assert said in pages["troubleshooting"], said


def test_messages_are_read_out_of_the_sources():
    found = hooks().messages()
    texts = [text for texts in found.values() for text in texts]
    assert len(texts) > 200
    assert "--out: ... is a file; name a folder" in found["uvc/app/run_dir.py"]
    assert "mlp: unknown activation ...; use one of ..." in found["kernels/mlp.py"]
    assert "...: M must be a multiple of the tokens" in found["csrc/cuda/attention.h"]
    said = CliRunner().invoke(cli, ["compact", ".", "--for", "cpu,threads=0"]).output
    assert any(
        text.split("...; ")[-1] in " ".join(said.split())
        for text in found["uvc/app/options.py"]
        if "--for" in text
    )


def test_links_out_of_the_docs_become_names_of_files():
    changed = hooks().on_page_markdown("see [the bench](../bench/README.md) and [data](data.md)")
    assert changed == "see the bench (`bench/README.md`) and [data](data.md)"

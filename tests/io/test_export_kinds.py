"""Every kind of attention and block, pruned and compacted, as an ONNX and a torch.export program."""

import sys

import pytest
import torch
from imports import ROOT
from oracle import structures

import uvc
from uvc.io.export import export

sys.path.append(str(ROOT / "tests" / "layers"))

from test_kinds import KINDS, made


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch-export", "onnx"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_kind_is_exported_with_the_outputs_of_the_model(name, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = made(name)
    with torch.no_grad():
        uvc.save(uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"])), tmp_path)
    _, difference = export(tmp_path, format)[:2]
    assert difference < 1e-4

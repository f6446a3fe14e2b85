"""A small model of every class that is served, compacted, as an ONNX and a torch.export program."""

import pytest
import torch
from oracle import structures
from served import EXAMPLES

import uvc
from uvc.io.export import export


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch-export", "onnx"])
@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.saved])
@pytest.mark.filterwarnings("ignore")
def test_a_kind_is_exported_with_the_outputs_of_the_model(name, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = EXAMPLES[name].make()
    with torch.no_grad():
        uvc.save(uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"])), tmp_path)
    _, difference = export(tmp_path, format)[:2]
    assert difference < 1e-4

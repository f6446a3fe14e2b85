"""A small model of every class that is served, compacted, as an ONNX and a torch.export program."""

from dataclasses import replace

import pytest
import torch
from oracle import structures
from served import EXAMPLES

import uvc
from uvc.io.export import export
from uvc.structure import Structure


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


@pytest.mark.filterwarnings("ignore")
def test_a_kept_head_without_q_k_dims_is_an_onnx_program_too(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = EXAMPLES["eva02 small"].make()
    with torch.no_grad():
        first, *rest = Structure.random(model, 0.5, seed=1).blocks
        structure = Structure((replace(first, qk_dims=((), *first.qk_dims[1:])), *rest))
        uvc.save(uvc.compact(uvc.apply_structure(model, structure)), tmp_path)
    assert export(tmp_path, "onnx")[1] < 1e-4

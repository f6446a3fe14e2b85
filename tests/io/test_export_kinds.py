"""A small model of every class that is served, compacted, as an ONNX and a torch.export program.

Each takes half a second by torch.export, and two to three by ONNX, where its packages are installed.
"""

from dataclasses import replace

import pytest
import torch
from oracle import error, images, structures
from served import EXAMPLES
from uvc_kernels.warn_once import said

import uvc
from uvc.io.export import export
from uvc.io.runtimes import FORMATS
from uvc.structure import Structure


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_a_kind_is_exported_with_the_outputs_of_the_model(name, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = EXAMPLES[name].make()
    with torch.no_grad():
        small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]))
    if EXAMPLES[name].saved:
        uvc.save(small, tmp_path)
        assert export(tmp_path, format)[1] < 1e-4
        return
    _, write, read, *_ = FORMATS[format]
    write(small.requires_grad_(False), images(model), tmp_path / "model")
    program = read(tmp_path / "model")
    for batch in (1, 3):
        x = images(model, batch)
        assert error(program(x), small(x)) < 1e-4


@pytest.mark.filterwarnings("ignore:(?!onnx)")
def test_a_model_that_the_optimiser_of_onnx_changes_is_exported_without_it(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said.clear()
    uvc.save(uvc.compact(uvc.convert(EXAMPLES["t2t performer"].make())), tmp_path)
    with pytest.warns(UserWarning, match="onnx: the exporter's optimiser changes this model"):
        assert export(tmp_path, "onnx")[1] < 1e-4


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

"""A small model of every class that is served, compacted, as an ONNX and a torch.export program."""

from dataclasses import replace

import pytest
import torch
from oracle import error, structures
from served import EXAMPLES
from uvc_kernels.warn_once import said

import uvc
from uvc.io.export import export
from uvc.io.runtimes import first, read_onnx, traced, write_onnx
from uvc.structure import Structure


def compacted(name: str) -> torch.nn.Module:
    """A small model of the kind, compacted at half of its size."""
    model = EXAMPLES[name].make()
    with torch.no_grad():
        small = uvc.compact(uvc.apply_structure(model, structures(model)["random at keep 0.5"]))
    return small.eval().requires_grad_(False)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_a_traced_kind_takes_any_batch_and_gives_the_outputs_of_the_model(name):
    example, small = EXAMPLES[name], compacted(name)
    program = traced(small, example.images(small)).module()
    for batch in (1, 3):
        x = example.images(small)[:1].repeat_interleave(batch, 0)
        assert error(first(program(x)), first(small(x))) < 1e-5


# The exporter traces a model twice and tries each of its rules at each node: seconds a model.
@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_a_kind_is_an_onnx_program_with_the_outputs_of_the_model(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = compacted(name)
    if EXAMPLES[name].saved:
        uvc.save(small, tmp_path)
        assert export(tmp_path, "onnx")[1] < 1e-4
        return
    x = EXAMPLES[name].images(small)
    write_onnx(small, x, tmp_path / "model.onnx")
    program = read_onnx(tmp_path / "model.onnx")
    for images in (x, x[:1]):
        assert error(program(images), first(small(images))) < 1e-4


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

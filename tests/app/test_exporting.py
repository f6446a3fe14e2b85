"""uvc export: 8-bit and 16-bit programs, a second runtime, sizes, times; refusals are one line."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch

import uvc
from uvc import cli
from uvc.app import exporting
from uvc.io import runtimes
from uvc.io.export import INT8, export

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in runtimes.ONNX), reason="pip install -e '.[onnx]'"
)
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="pip install openvino"
)


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("threads, rests", [(1, []), (2, [exporting.REST])])
def test_a_timed_pass_follows_one_of_its_own_and_with_several_threads_a_rest(threads, rests, monkeypatch):
    did = []
    monkeypatch.setattr(exporting.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(exporting, "sleep", did.append)
    assert exporting.second_pass(lambda x: did.append("pass"), torch.zeros(1)) >= 0.0
    assert did == [*rests, "pass", "pass"]


def told(arguments, capsys):
    """What `uvc export --json` says."""
    assert cli.run(["export", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@needs_onnx
def test_int8_multiplies_in_8_bits_and_is_judged_on_validation_images(folder, capsys):
    import onnx

    found = told([folder, "--format", "onnx", "--int8", "--time"], capsys)
    assert found["file"].endswith("model.int8.onnx") and 0 < found["difference"] <= INT8
    program = onnx.load(found["file"])
    stored = {tensor.name: tensor.data_type for tensor in program.graph.initializer}
    small = uvc.load(folder)
    products = [m for m in small.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel()]
    in_8_bits = sum(kind == onnx.TensorProto.INT8 for kind in stored.values())
    assert in_8_bits >= len(products) > 3
    assert found["images"] == 500 and abs(found["top1"] - found["float32_top1"]) < 5
    assert min(found[name] for name in ("ms", "dense_ms", "float32_ms", "ratio", "float32_ratio")) > 0
    # Convolutions and products of two activations stay in float32, and so does what comes out of a product.
    nodes = {out: node for node in program.graph.node for out in node.output}
    for node in program.graph.node:
        if node.op_type == "MatMul" and node.input[1] in nodes:
            from_weights = nodes[node.input[1]].op_type == "DequantizeLinear"
            assert (nodes[node.input[0]].op_type == "DequantizeLinear") == from_weights
        if node.op_type == "Conv":
            assert [stored[name] for name in node.input[1:]] == [onnx.TensorProto.FLOAT] * 2
        if node.op_type == "Softmax":
            assert nodes[node.input[0]].op_type != "DequantizeLinear"
    said = {entry.key: json.loads(entry.value) for entry in program.metadata_props}
    assert said["label_names"] == list(small.pretrained_cfg["label_names"])


@needs_onnx
def test_int8_is_timed_with_as_many_threads_as_float32_whatever_the_run_had(folder, capsys):
    run = folder / "run.json"
    options = json.loads(run.read_text())
    options["training"]["threads"] = 1
    run.write_text(json.dumps(options))
    before = torch.get_num_threads()
    try:
        for asked, threads in ([], 2), (["--threads", "3"], 3):
            torch.set_num_threads(2)
            for more in [], ["--int8"]:
                found = told([folder, "--format", "onnx", "--time", *asked, *more], capsys)
                assert found["threads"] == threads
    finally:
        torch.set_num_threads(before)


@needs_onnx
def test_float16_is_compared_with_the_model_in_float32(folder, capsys):
    found = told([folder, "--format", "onnx", "--dtype", "float16"], capsys)
    plain = told([folder, "--format", "onnx"], capsys)
    assert found["file"].endswith("model.float16.onnx") and 0 < found["difference"] < 1e-2
    assert found["bytes"] < plain["bytes"] and plain["difference"] < 1e-5
    assert runtimes.read_onnx(found["file"])(torch.zeros(3, 1, 8, 8).half()).dtype == torch.float16
    assert next(uvc.load(folder).parameters()).dtype == torch.float32


@needs_onnx
@needs_openvino
def test_openvino_must_agree(folder, monkeypatch, capsys):
    assert told([folder, "--format", "onnx", "--check", "openvino"], capsys)["difference"] < 1e-4
    monkeypatch.setitem(runtimes.CHECKS["onnx"], "openvino", lambda path: lambda x: torch.zeros(len(x), 10))
    with pytest.raises(RuntimeError, match="nothing was kept"):
        export(folder, "onnx", folder / "other.onnx", check="openvino")
    assert not (folder / "other.onnx").exists()


@pytest.mark.slow
def test_a_compiled_package_runs_from_where_it_is_delivered(folder, capsys):
    found = told([folder, "--format", "aoti", "--time"], capsys)
    assert found["file"].endswith("model.aoti.pt2") and found["difference"] < 1e-5 and found["ratio"] > 0
    images = torch.randn(5, 1, 8, 8)
    out = runtimes.read_aoti(found["file"])(images)
    torch.testing.assert_close(out, uvc.load(folder)(images), rtol=1e-4, atol=1e-5)


REFUSED = {
    "int8 of another format": (["--format", "torch-export", "--int8"], {}, "use --format onnx"),
    "int8 in 16 bits": (
        ["--format", "onnx", "--int8", "--dtype", "float16"],
        {},
        "leave --dtype float16 out",
    ),
    "a dtype": (["--format", "onnx", "--dtype", "int4"], {}, "--dtype: 'int4'; use one of float32"),
    "a check of another format": (["--format", "aoti", "--check", "openvino"], {}, "use openvino for onnx"),
    "no onnxruntime": (
        ["--format", "onnx"],
        {"onnxruntime": None},
        "pip install onnx onnxscript onnxruntime",
    ),
    "no openvino": (["--format", "onnx", "--check", "openvino"], {"openvino": None}, "pip install openvino"),
    "no compiler": (["--format", "aoti"], "PATH", "needs a C++ compiler"),
}


@needs_onnx
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_one_line_before_any_work(case, folder, monkeypatch, capsys):
    arguments, gone, says = REFUSED[case]
    monkeypatch.setattr(exporting, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("uvc.io.export.load", lambda *_: pytest.fail("the model was loaded"))
    if gone == "PATH":
        monkeypatch.setenv("PATH", "/none")
        monkeypatch.delenv("CXX", raising=False)
    else:
        for name in gone:
            monkeypatch.setitem(sys.modules, name, None)
    assert cli.run(["export", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (folder / "export").exists()


@needs_onnx
def test_data_that_cannot_be_had_is_refused_before_the_model_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("uvc.io.export.load", lambda *_: pytest.fail("the model was loaded"))
    arguments = ["export", str(folder), "--format", "onnx", "--int8", "--data", str(folder / "none")]
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert "is no known data set" in error and error.count("\n") == 1


@needs_onnx
def test_int8_without_a_run_asks_for_data(folder, tmp_path, capsys):
    uvc.save(uvc.load(folder), tmp_path / "alone")
    assert cli.run(["export", str(tmp_path / "alone"), "--format", "onnx", "--int8"]) == 2
    assert "on which data to calibrate; give --data" in capsys.readouterr().err

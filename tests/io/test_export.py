"""uvc export: every format is read back, equal, and free in its batch size; bad input is one line."""

import copy
import importlib.util
import json
import sys

import pytest
import timm
import torch
from oracle import TOLERANCE, small_vit, stored
from oracle import error as error_of
from served import made

import uvc
import uvc.models
from uvc.cli import run
from uvc.compaction import in_form
from uvc.io.export import export, suited
from uvc.io.runtimes import write_onnx
from uvc.io.serialization import load

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the onnx packages are not installed",
)
# Relative to the largest output, against the model in float32.
HALF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A compacted ViT with ragged heads, a half without neurons and a skipped half, on disk."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, num_classes=10)
    uvc.apply_structure(model, uvc.Structure.random(model, keep=0.5, seed=0))
    model.blocks[1].set_skip(True, False)
    model.blocks[2].mlp.set_kept(torch.zeros(192, dtype=torch.bool))
    path = tmp_path_factory.mktemp("run")
    uvc.save(uvc.compact(model), path)
    return path


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32)


def test_an_exported_program_takes_any_batch_and_computes_the_same(folder, images, tmp_path):
    target, error = export(folder, "torch-export", tmp_path / "model.pt2")
    assert error < 1e-5
    found = torch.export.load(target).module()(images)
    torch.testing.assert_close(found, load(folder).eval()(images), rtol=1e-4, atol=1e-5)


def test_neurons_are_padded_for_onnx_alone(images):
    model = small_vit(mlp_ratio=38 / 24)
    small = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5))).eval()
    padded, x = suited(small, "onnx"), images[..., :16, :16]
    assert suited(small, "torch-export") is small and suited(small, "onnx", int8=True) is small
    for a, b in zip(small.blocks, padded.blocks, strict=True):
        assert a.mlp.fc1.out_features % 8 and not b.mlp.fc1.out_features % 8
        assert a.attn.groups == b.attn.groups
    torch.testing.assert_close(padded(x), small(x), rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("form", ["grouped", "padded"])
def test_heads_of_an_onnx_program_run_alone_and_are_not_turned_around(form, folder, images, tmp_path):
    import onnx

    small = load(folder)
    uvc.save(in_form(small, form), tmp_path / form)
    target, error = export(tmp_path / form, "onnx")
    assert error < 1e-5
    ops = [node.op_type for node in onnx.load(target).graph.node]
    heads = sum(len(block.record.heads) for block in small.blocks if block.record.attn)
    assert ops.count("Softmax") == heads
    assert ops.count("Transpose") <= heads + 2  # keys, which products take turned; patches
    halves = [(b.attn and b.heads, b.mlp and b.neurons) for b in (block.record for block in small.blocks)]
    products = 2 * sum(bool(half) for pair in halves for half in pair)
    assert ops.count("Gemm") == products + 1  # they add their bias; the classifier
    assert ops.count("Split") <= sum(bool(heads) for heads, _ in halves)
    # Of matrices all along: two of an attention, one between blocks, three of the patches.
    assert ops.count("Reshape") <= 2 * sum(bool(heads) for heads, _ in halves) + len(halves) + 3


@needs_onnx
@pytest.mark.parametrize("kind", ["eva02", "geglu", "grouped queries"])
def test_gated_mlps_and_q_k_and_v_of_their_own_add_their_bias_in_one_op_too(kind, tmp_path):
    import onnx

    model = made(kind)
    small = uvc.compact(uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=1))).eval()
    write_onnx(small, torch.randn(2, 3, 16, 16), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    alone = [node for node in graph.node if node.op_type == "MatMul" and weights & set(node.input)]
    assert not alone and any(node.op_type == "Gemm" for node in graph.node)


def test_padded_heads_are_exported_as_one_product(folder, images, tmp_path):
    small = load(folder)
    uvc.save(in_form(small, "padded"), tmp_path / "padded")
    target, error = export(tmp_path / "padded", "torch-export")
    assert error < 1e-5
    program = torch.export.load(target)
    torch.testing.assert_close(program.module()(images), small(images), rtol=1e-4, atol=1e-5)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    running = sum(block.record.attn for block in small.blocks)
    assert sum("scaled_dot_product" in call for call in calls) == running
    assert not any("baddbmm" in call for call in calls)


def test_safetensors_go_to_a_folder_that_uvc_loads(folder, images, tmp_path):
    target, error = export(folder, "safetensors", tmp_path / "model")
    written = ["README.md", "config.json", "model.safetensors", "structure.svg"]
    assert error == 0 and sorted(p.name for p in target.iterdir()) == written
    first, second = load(folder).eval(), uvc.load(target).eval()
    assert stored(first) == stored(second)
    assert error_of(second(images), first(images)) < TOLERANCE[images.dtype]


@needs_onnx
def test_an_onnx_program_takes_any_batch_and_computes_the_same(folder, images, tmp_path):
    import onnxruntime

    target, error = export(folder, "onnx", tmp_path / "model.onnx")
    assert error < 1e-4
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), load(folder).eval()(images), rtol=1e-3, atol=1e-4)


def test_the_command_names_the_file_it_wrote(folder, capsys):
    assert run(["export", str(folder), "--format", "torch-export"]) == 0
    assert str(folder / "export" / "model.pt2") in capsys.readouterr().out
    assert (folder / "export" / "model.pt2").is_file()


def test_a_program_that_differs_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["uvc.io.export"].TOLERANCE, torch.float32, -1.0)
    with pytest.raises(RuntimeError, match="nothing was kept"):
        export(folder, "torch-export", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format: 'tflite'; use one of safetensors, onnx, torch-export"),
        (["--format", "torch-export", "--to", "/proc/none/model.pt2"], "--to: '/proc/none/model.pt2'"),
    ],
    ids=["format", "place"],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, folder, capsys):
    assert run(["export", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_package_is_named_with_its_remedy(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match="needs the package 'onnx'; pip install onnx"):
        export(folder, "onnx", tmp_path / "model.onnx")


def small(state: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    model.pretrained_cfg["label_names"] = tuple("abcdefghij")
    if state != "dense":
        uvc.apply_structure(model, uvc.Structure.random(model, keep=0.5, seed=0))
    return (uvc.compact(model) if state == "compacted" else model).to(dtype).eval()


def answer(target, images: torch.Tensor) -> torch.Tensor:
    """What a delivered program computes, each in a runtime of its own."""
    if target.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        return (uvc.load(target) if target.is_dir() else torch.export.load(target).module())(images)


@needs_onnx
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@pytest.mark.parametrize("format", ["onnx", "torch-export", "safetensors"])
def test_whatever_was_saved_is_exported_with_the_same_outputs(format, state, batch, tmp_path):
    model, images = small(state), torch.randn(batch, 3, 32, 32)
    uvc.save(model, tmp_path)
    target, difference = export(tmp_path, format)
    found = answer(target, images)
    torch.testing.assert_close(found, model(images).detach(), rtol=1e-3, atol=1e-4)
    assert difference < 1e-5


@needs_onnx
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("format", ["onnx", "torch-export", "safetensors"])
def test_a_half_model_is_exported_in_its_dtype_or_refused_in_one_line(format, dtype, tmp_path, capsys):
    model, images = small("compacted"), torch.randn(4, 3, 32, 32)
    expected = model(images).detach()
    uvc.save(model.to(dtype), tmp_path)
    code = run(["export", str(tmp_path), "--format", format])
    if format == "onnx" and dtype == torch.bfloat16:
        error = capsys.readouterr().err
        assert code == 2 and "give --dtype float32 or float16" in error and error.count("\n") == 1
        assert not (tmp_path / "export").exists()
        return
    assert code == 0
    found = answer(export(tmp_path, format)[0], images.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < HALF[dtype] * expected.abs().max()


@needs_onnx
def test_dtypes_that_onnx_does_not_run_in_are_refused_before_anything_is_written(tmp_path):
    model = small("compacted")
    uvc.save(model, tmp_path / "float32")
    uvc.save(model.half(), tmp_path / "float16")
    with pytest.raises(ValueError, match="--dtype: NumPy has no bfloat16"):
        export(tmp_path / "float32", "onnx", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"--int8: .* the model is in float16; save it in float32"):
        export(tmp_path / "float16", "onnx", calibration=[torch.randn(2, 3, 32, 32)])
    assert not any((tmp_path / name / "export").exists() for name in ("float32", "float16"))


@needs_onnx
def test_weights_in_a_file_of_their_own_are_delivered_and_move_along(tmp_path, monkeypatch, images):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    model = small("compacted")
    uvc.save(model, tmp_path / "run")
    target, _ = export(tmp_path / "run", "onnx", tmp_path / "out" / "net.onnx")
    assert sorted(file.name for file in target.parent.iterdir()) == ["net.onnx", "net.onnx.data"]
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "net.onnx"
    torch.testing.assert_close(answer(moved, images), model(images).detach(), rtol=1e-3, atol=1e-4)
    # A later export that needs no second file leaves none behind.
    monkeypatch.undo()
    export(tmp_path / "run", "onnx", moved)
    assert [file.name for file in moved.parent.iterdir()] == ["net.onnx"]


@needs_onnx
def test_what_is_broken_where_it_is_delivered_is_not_kept(tmp_path, monkeypatch):
    from uvc.io import export as module

    def put_a_part(written, target):
        (written.parent / (written.name + ".data")).unlink()
        return put(written, target)

    put = module._put
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    monkeypatch.setattr(module, "_put", put_a_part)
    uvc.save(small("compacted"), tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be run here"):
        export(tmp_path / "run", "onnx", tmp_path / "out" / "net.onnx")
    assert list((tmp_path / "out").iterdir()) == []


@needs_onnx
def test_programs_say_how_images_are_prepared_and_what_classes_are_called(tmp_path):
    import onnx

    uvc.save(small("compacted"), tmp_path)
    program = onnx.load(export(tmp_path, "onnx")[0])
    said = {entry.key: json.loads(entry.value) for entry in program.metadata_props}
    files = {"preprocessing.json": ""}
    torch.export.load(export(tmp_path, "torch-export")[0], extra_files=files)
    assert said == json.loads(files["preprocessing.json"])
    assert said["label_names"] == list("abcdefghij") and said["mean"] == [0.485, 0.456, 0.406]


def test_a_model_whose_outputs_are_all_zero_is_exported(tmp_path):
    model = small("compacted")
    torch.nn.init.zeros_(model.head.weight)
    uvc.save(model, tmp_path)
    assert export(tmp_path, "torch-export")[1] == 0.0


@pytest.mark.parametrize("command", ["eval", "export"])
def test_dtypes_that_torch_does_not_mix_are_refused_in_one_line(command, tmp_path, capsys):
    model = timm.create_model("uvc_vit_digits", depth=1)
    model.head.half()
    uvc.save(uvc.compact(model), tmp_path)
    assert run([command, str(tmp_path), *(["--format", "torch-export"] if command == "export" else [])]) == 2
    error = capsys.readouterr().err
    assert "mixes float32 (cls_token) and float16 (head.weight)" in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("compacted", [False, True], ids=["full size", "compacted"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_of_another_dtype_is_evaluated(dtype, compacted, tmp_path, capsys):
    model = uvc.apply_structure(
        m := timm.create_model("uvc_vit_digits", depth=1), uvc.Structure.random(m, 0.5)
    )
    uvc.save((uvc.compact(model) if compacted else model).to(dtype), tmp_path)
    assert run(["eval", str(tmp_path)]) == 0
    assert "of 500 images" in capsys.readouterr().out


@pytest.mark.parametrize("who", ["model", "teacher"])
def test_compress_refuses_half_weights_in_one_line(who):
    model = timm.create_model("uvc_vit_digits", depth=1)
    loader = [(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))]
    halved = copy.deepcopy(model).half()
    with pytest.raises(ValueError, match=f"^{who}: its weights are float16") as caught:
        uvc.compress(*((halved,) if who == "model" else (model,)), loader, loader, teacher=halved)
    assert "\n" not in str(caught.value)

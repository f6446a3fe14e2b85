"""Programs of other runtimes: what writes one, what reads it back as a function of images, what both need."""

import importlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uvc.io.preprocessing import preprocessing_of
from uvc.io.serialization import load, save
from uvc.layers import facts_of

Program = Callable[[Tensor], Tensor]
ONNX = ("onnx", "onnxscript", "onnxruntime")


class OneOutput(nn.Module):
    """The first of a model's outputs: of transformers' models the logits, or the features of all tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the first output."""
        return first(self.model(x))


def first(outputs: Any) -> Tensor:
    """Outputs that are one tensor, or the first of several."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def one_output(model: nn.Module) -> nn.Module:
    """A model that gives one tensor: of transformers' models, a wrapper around it."""
    return model if facts_of(model) is None else OneOutput(model).train(model.training)


class Format(NamedTuple):
    """The default name in a folder, what writes a program, what reads it back, and the packages for both.

    optimised: whether `write` takes `optimize=False`, for a model that an optimiser changes.
    """

    name: str
    write: Callable[..., None]
    read: Callable[[Path], Program]
    packages: tuple[str, ...] = ()
    compiler: bool = False
    optimised: bool = False


def write_safetensors(model: nn.Module, x: Tensor, path: Path) -> None:
    save(model, path)


def write_torch_export(model: nn.Module, x: Tensor, path: Path) -> None:
    extra = {"preprocessing.json": json.dumps(preprocessing_of(model))}
    torch.export.save(traced(model, x), path, extra_files=extra)


def write_aoti(model: nn.Module, x: Tensor, path: Path) -> None:
    """A package of compiled code and weights: C++ and Python load it without tracing or the model's code."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(traced(model, x), package_path=str(path))


def read_aoti(path: Path) -> Program:
    """The package in this process."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def traced(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """The first output of a model as a program of torch.export, for any number of images like x."""
    return torch.export.export(one_output(model), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(model: nn.Module, x: Tensor, path: Path, optimize: bool = True) -> None:
    """Weights of large models go to a file beside it, which it names by a relative path.

    optimize: by the exporter, which takes the sum with a constant of 1e-8 or less for one with zero.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            one_output(model), (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"], output_names=["logits"], verbose=False, optimize=optimize,
        )  # fmt: skip
        for key, value in (preprocessing_of(model) or {}).items():
            program.model.metadata_props[key] = json.dumps(value)
        program.save(path)


def write_onnx_int8(
    model: nn.Module, x: Tensor, path: Path, images: Sequence[Tensor], optimize: bool = True
) -> None:
    """An ONNX program whose products with weights are of 8-bit numbers, by ONNX Runtime's quantisation.

    Ranges of activations are those on `images`, batches that the model sees in use. Products of two
    activations, convolutions, softmax and norms stay in float32.
    """
    tools = importlib.import_module("onnxruntime.quantization")
    onnx = importlib.import_module("onnx")

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as draft:
        plain, ready = Path(draft, "plain.onnx"), Path(draft, "ready.onnx")
        write_onnx(model, x, plain, optimize)
        tools.shape_inference.quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        # Results stay in float32: else what follows is of 8-bit numbers, too, and softmax is slow in them. A
        # convolution with such results would run in float32, on numbers that are quantised and back.
        kinds = ["MatMul", "Gemm"]
        rest = {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": kinds}
        tools.quantize_static(
            str(ready), str(path), Reader(),
            quant_format=tools.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=kinds, nodes_to_exclude=_without_weights(onnx.load(ready)),
            activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8, extra_options=rest,
        )  # fmt: skip
        program = onnx.load(path)
        onnx.helper.set_model_props(
            program, {k: json.dumps(v) for k, v in (preprocessing_of(model) or {}).items()}
        )
        onnx.save(program, path)


def _without_weights(program: Any) -> list[str]:
    """The names of an ONNX program's products of two activations."""
    weights = {tensor.name for tensor in program.graph.initializer}
    return [n.name for n in program.graph.node if n.op_type == "MatMul" and n.input[1] not in weights]


def read_onnx(path: Path) -> Program:
    """The program in ONNX Runtime, on the CPU, with torch's number of threads."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors are raised
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def read_openvino(path: Path) -> Program:
    """An ONNX program in OpenVINO, on the CPU, in the precision it was written in."""
    openvino = importlib.import_module("openvino")
    asked = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(str(path), "CPU", asked)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def need(packages: Sequence[str], option: str, value: str) -> None:
    """ValueError, naming the option and the remedy, where a package is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            said = f"{option}: {value} needs the package {package!r}; pip install {' '.join(packages)}"
            raise ValueError(said) from error


def need_compiler(option: str, value: str) -> None:
    """ValueError where no C++ compiler is at hand."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in names):
        raise ValueError(f"{option}: {value} needs a C++ compiler; install g++, or set CXX to one")


FORMATS: dict[str, Format] = {
    "safetensors": Format("safetensors", write_safetensors, lambda path: load(path).eval()),
    "onnx": Format("model.onnx", write_onnx, read_onnx, ONNX, optimised=True),
    "torch-export": Format("model.pt2", write_torch_export, lambda path: torch.export.load(path).module()),
    "aoti": Format("model.aoti.pt2", write_aoti, read_aoti, compiler=True),
}
# Other runtimes that read a format, for a second opinion.
CHECKS = {"onnx": {"openvino": read_openvino}}

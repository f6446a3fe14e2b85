"""Export a pruned model to ONNX and run it in ONNX Runtime: pip install onnx onnxscript onnxruntime."""

import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch

import uvc
from uvc.io.export import export

model = uvc.convert(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10)).eval()
uvc.apply_structure(model, uvc.Structure.random(model, keep=0.5))
with tempfile.TemporaryDirectory() as folder:
    uvc.save(uvc.compact(model), folder)
    path, difference = export(Path(folder), "onnx")  # read back and compared before it is kept
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

images = torch.randn(3, 3, 64, 64)  # the number of images is free
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
with torch.no_grad():
    apart = (torch.from_numpy(logits) - model(images)).abs().max().item()
print(f"{path.name}: outputs differ by {apart:.1e}")

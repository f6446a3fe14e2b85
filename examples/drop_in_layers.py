"""UVC's layers in a timm model: skip pruned structure on the fly, then make the model physically smaller."""

import timm
import torch

import uvc

model = timm.create_model(
    "vit_tiny_patch16_224", attn_layer=uvc.UVCAttention, mlp_layer=uvc.UVCMlp, img_size=64, num_classes=10
)
# Pretrained models come in by conversion: same weights, same state_dict keys, same outputs.
model = uvc.convert(model).eval()
images = torch.randn(2, 3, 64, 64)
print(f"dense:     {uvc.cost(model).macs / 1e6:7.1f} M MACs, {uvc.cost(model).params / 1e6:.2f} M parameters")

# Half of every block goes, at random; the full weights stay, so this can be changed at every step.
uvc.apply_structure(model, uvc.Structure.random(model, keep=0.5, seed=0))
print(f"structure: {uvc.cost(model).macs / 1e6:7.1f} M MACs, {uvc.cost(model).params / 1e6:.2f} M parameters")

small = uvc.compact(model)
with torch.no_grad():
    difference = (model(images) - small(images)).abs().max().item()
parameters = sum(p.numel() for p in small.parameters())
print(f"compacted: {parameters / 1e6:.2f} M parameters held, outputs differ by {difference:.1e}")

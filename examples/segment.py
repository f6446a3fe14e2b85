"""Compress a segmentation model: a backbone of timm under a head of your own, trained on made images.

    python examples/segment.py [EPOCHS]

EPOCHS (default 10) is the length of the training, of the search, and of the training after it. Every image
holds a bright disc on noise; each pixel is to be told apart.
"""

import sys
from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import uvc
from uvc.config import Config

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
torch.manual_seed(0)


class Segmenter(nn.Module):
    """Maps of two blocks, joined and enlarged. Only the backbone is pruned; the head learns with it."""

    def __init__(self):
        super().__init__()
        sizes = dict(img_size=32, patch_size=4, depth=4, embed_dim=48, num_heads=3, num_classes=0)
        self.backbone = timm.create_model("vit_tiny_patch16_224", **sizes)
        self.head = nn.Conv2d(2 * 48, 2, 3, padding=1)

    def forward(self, images):
        maps = self.backbone.forward_intermediates(images, indices=[1, 3], intermediates_only=True, norm=True)
        return F.interpolate(self.head(torch.cat(maps, dim=1)), size=images.shape[-2:], mode="bilinear")


def made(count):
    """Images [B, 3, 32, 32], and which pixels are in a disc [B, 32, 32]."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    y, x, radius = (
        8 + 16 * torch.rand(count, 1, 1),
        8 + 16 * torch.rand(count, 1, 1),
        4 + 4 * torch.rand(count, 1, 1),
    )
    inside = (rows - y).square() + (columns - x).square() < radius.square()
    return torch.randn(count, 3, 32, 32) * 0.5 + inside[:, None], inside.long()


def loss(model, batch):
    images, masks = batch
    return {"loss": F.cross_entropy(model(images), masks)}


def evaluate(model):
    """Intersection over union of the disc."""
    images, masks = held_out
    found = model(images).argmax(1)
    return 100.0 * (found & masks).sum() / (found | masks).sum()


model, held_out = Segmenter(), made(64)
loader = DataLoader(list(zip(*made(256), strict=True)), batch_size=16, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(epochs):
    for batch in loader:
        loss(model, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

config = replace(Config(), warmup_epochs=0, search_epochs=epochs, post_epochs=epochs)
result = uvc.compress(model, loader, budget=0.5, loss=loss, evaluate=evaluate, config=config)
print(f"intersection over union: {result.teacher_score:.1f} dense, {result.final_score:.1f} compressed")
small = uvc.compact(result.model)
with torch.no_grad():
    difference = (small(held_out[0]) - result.model(held_out[0])).abs().max()
kept = result.cost.macs / result.dense_cost.macs
print(f"{kept:.2f} of the MACs; compacted outputs differ by {difference:.1e}")

"""Compress a backbone without labels: it keeps the features that it gave before, as one compresses a DINOv2.

    python examples/match_features.py [EPOCHS]

EPOCHS (default 10) is the length of the search, and of the training after it. The backbone has the shape of
DINOv2, narrow and with random weights, and the images are made, so that nothing is fetched; put your own
weights and images in their place.
"""

import copy
import sys
import tempfile
from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import uvc
from uvc.config import Config

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
torch.manual_seed(0)
# No classes: the model gives its class token.
sizes = dict(img_size=56, depth=4, embed_dim=96, num_heads=6, num_classes=0, init_values=1.0)
model = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)
teacher = copy.deepcopy(model).eval().requires_grad_(False)


def made(count):
    """Smooth random pictures."""
    return F.interpolate(torch.randn(count, 3, 7, 7), size=56, mode="bicubic")


def loss(model, images):
    """How far class and patch features are from the teacher's, each over its own mean square."""
    found, aim = model.forward_features(images), teacher.forward_features(images)
    parts = {"class": slice(0, 1), "patches": slice(model.num_prefix_tokens, None)}
    off = {
        name: (found - aim)[:, part].square().mean() / aim[:, part].square().mean()
        for name, part in parts.items()
    }
    return {"loss": sum(off.values()), **off}


def evaluate(model):
    """Mean cosine of all features with the teacher's: 1 is the same."""
    aim = teacher.forward_features(held_out)
    return F.cosine_similarity(model.forward_features(held_out), aim, dim=-1).mean()


images, held_out = made(128), made(32)
config = replace(Config(), warmup_epochs=1, search_epochs=epochs, post_epochs=epochs, learning_rate=1e-3)
loader = DataLoader(images, batch_size=16, shuffle=True)
result = uvc.compress(model, loader, budget=0.5, loss=loss, evaluate=evaluate, config=config)
print(f"after the search, cosine {result.before_post_score:.3f}; at the end {result.final_score:.3f}")

small = uvc.compact(result.model)
with tempfile.TemporaryDirectory() as folder:
    uvc.save(small, folder)
    small = uvc.load(folder)
# A backbone as any of timm's: maps of the last two blocks, prefix tokens aside.
maps = small.forward_intermediates(held_out[:2], indices=2, intermediates_only=True, norm=True)
print(f"{result.cost.macs / result.dense_cost.macs:.2f} of the MACs; maps", [tuple(m.shape) for m in maps])

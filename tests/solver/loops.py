"""A model, batches for it and the training loop around a search, as the tests of this folder share them."""

import torch
from timm.models.vision_transformer import VisionTransformer


def small_vit():
    """3 blocks of 3 heads with 4 dims and 24 neurons, for 4 patches."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2.0
    )


def batch(seed):
    """8 images and their labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(batch, model, search, optimizer, steps, first=0):
    """Steps `first` to `first + steps - 1`; `batch(i)` gives images and labels."""
    for i in range(first, first + steps):
        images, labels = batch(i)
        search.before()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        search.observe()
        optimizer.step()
        search.step(optimizer)
        optimizer.zero_grad()

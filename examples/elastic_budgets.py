"""One model for several budgets, switched in place."""

import tempfile

import torch
from digits_task import loaders, trained_vit

import uvc
from uvc.config import Config

train, val = loaders()
config = Config(
    warmup_epochs=1, search_epochs=4, post_epochs=2, learning_rate=1e-3, search_learning_rate=1e-3
)
with tempfile.TemporaryDirectory() as folder:
    result = uvc.compress(trained_vit(train), train, val, budget=(0.7, 0.4), config=config, out=folder)
    model = uvc.load(folder)  # stands at the largest
    small = uvc.load(folder, budget=0.4)  # plain torch modules of that budget alone

images, labels = next(iter(val))
for budget in (0.7, 0.4):
    uvc.set_budget(model, budget)
    with torch.no_grad():
        right = (model(images).argmax(-1) == labels).float().mean()
    print(
        f"budget {budget}: {uvc.cost(model).macs / result.dense_cost.macs:.4f} of the MACs, {right:.1%} right"
    )
with torch.no_grad():
    print(f"alone it differs by {(small(images) - model(images)).abs().max():.1e}")

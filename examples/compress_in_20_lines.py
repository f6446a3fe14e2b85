"""Compress a trained timm model to half of its MACs, save it, and load the small one."""

import tempfile

from digits_task import loaders, trained_vit

import uvc
from uvc.config import Config

train, val = loaders()
model = uvc.convert(trained_vit(train))
config = Config(
    warmup_epochs=1, search_epochs=4, post_epochs=2, learning_rate=1e-3, search_learning_rate=1e-3
)
result = uvc.compress(model, train, val, budget=0.5, config=config)

with tempfile.TemporaryDirectory() as folder:
    uvc.save(uvc.compact(result.model), folder)
    small = uvc.load(folder)
share = uvc.cost(small).macs / result.dense_cost.macs
print(f"{result.teacher_top1:.1f} % before, {result.final_top1:.1f} % at {share:.4f} of the MACs")

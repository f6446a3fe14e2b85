"""Compress a small vision transformer on handwritten digits from Python, and use the result.

    python examples/compress_digits.py [EPOCHS]

EPOCHS (default 10) is the length of the teacher's training, of the search, and of the training after it.
"""

import sys
from dataclasses import replace

import timm
import torch

import uvc
import uvc.models  # registers uvc_vit_digits
from uvc.recipes import RECIPES
from uvc.training.compress import train_teacher
from uvc.training.data import load_data
from uvc.training.logger import RunLog

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
config = replace(RECIPES["digits"](), teacher_epochs=epochs, search_epochs=epochs, post_epochs=epochs)
torch.manual_seed(config.seed)
data = load_data("digits", model_input=(1, 8, 8), batch_size=config.batch_size, seed=config.seed)

model = uvc.convert(timm.create_model("uvc_vit_digits"))
teacher = train_teacher(model, data.train, data.val, config, RunLog(None, progress=True))
result = uvc.compress(model, data.train, data.val, budget=0.5, config=config)

small = uvc.compact(result.model)
print(f"teacher    {teacher:.1f} % of test digits right with {result.dense_cost.macs / 1e6:.2f} M MACs")
print(f"compressed {result.final_top1:.1f} % of test digits right with {result.cost.macs / 1e6:.2f} M MACs")
for i, block in enumerate(result.structure.blocks):
    print(f"block {i}: {len(block.heads)} heads, {len(block.neurons)} neurons")
images, labels = next(iter(data.val))
print("first test digits:", labels[:10].tolist(), "predicted:", small(images[:10]).argmax(-1).tolist())

"""Several processes share each batch and find one structure:

torchrun --nproc_per_node 2 examples/two_processes.py
"""

import os

from digits_task import loaders, trained_vit

import uvc
from uvc.config import Config

# Every process makes the same model; batches are read in rank 0 and shared out.
train, val = loaders()
model = trained_vit(train, epochs=1)
config = Config(
    warmup_epochs=1, search_epochs=2, post_epochs=1, learning_rate=1e-3, search_learning_rate=1e-3
)
result = uvc.compress(model, train, val, budget=0.6, config=config)
kept = sum(len(block.neurons) for block in result.structure.blocks)
print(f"rank {os.environ.get('RANK', 0)} keeps {kept} neurons, top-1 {result.final_top1:.1f} %", flush=True)

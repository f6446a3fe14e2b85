"""A budget in latency: measure the parts of the model where it will run, then search by that.

python latency_budget.py [EPOCHS]   # of the search; 4
"""

import sys

import torch
from digits_task import loaders, trained_vit

import uvc
from uvc.config import Config
from uvc.latency_table import measure, verify

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4
torch.set_num_threads(1)
train, val = loaders()
model = uvc.convert(trained_vit(train))
table = measure(model, batch=8, rounds=3 * epochs)  # table.to_json() carries it to another machine
config = Config(
    warmup_epochs=1, search_epochs=epochs, post_epochs=1, learning_rate=1e-3, search_learning_rate=1e-3
)
result = uvc.compress(model, train, val, budget=0.7, metric="latency", latency=table, config=config)

check = verify(table, result.teacher, uvc.compact(result.model))
print(f"{check.predicted:.3f} of the time predicted, {check.measured:.3f} measured")

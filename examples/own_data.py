"""Images of your own: any Dataset of (image, label) in a DataLoader. The command line takes folders:
`uvc data DIR` looks them over, `uvc compress --data DIR` reads them.
"""

import torch
from digits_task import loaders, trained_vit
from torch.utils.data import DataLoader, Dataset

import uvc
from uvc.config import Config


class Bars(Dataset):
    """Noise with a bright bar in one of ten places: the place is the class."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        image = 0.3 * torch.randn(1, 8, 8, generator=generator)
        place = index % 10
        row, column = divmod(place, 5)
        image[:, 4 * row + 1 : 4 * row + 3, column : column + 3] += 1.0
        return image, place


train = DataLoader(Bars(1280, 0), 128, shuffle=True, drop_last=True)
val = DataLoader(Bars(320, 10_000), 128)
model = trained_vit(train)
config = Config(
    warmup_epochs=1, search_epochs=3, post_epochs=1, learning_rate=1e-3, search_learning_rate=1e-3
)
result = uvc.compress(model, train, val, budget=0.4, config=config)
print(f"{result.final_top1:.1f} % at {result.cost.macs / result.dense_cost.macs:.4f} of the MACs")

# What does not fit is refused in one line, before any training.
try:
    uvc.compress(model, loaders(batch_size=10**6)[0], val, config=config)
except ValueError as error:
    print(f"refused: {error}")

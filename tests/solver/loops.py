"""The training loop around a search, as the tests of this folder share it."""

import torch


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

"""A loss and a score of your own: a model learns to keep its former features, without labels."""

import copy

import torch
from digits_task import loaders, trained_vit

import uvc
from uvc.config import Config

train, val = loaders()
model = uvc.convert(trained_vit(train))
former = copy.deepcopy(model).eval()


def loss(model, batch):
    """The distance of features; every number returned is logged."""
    images, _ = batch
    with torch.no_grad():
        aim = former.forward_features(images)
    features = model.forward_features(images)
    return {"loss": (features - aim).square().mean(), "size": features.detach().abs().mean()}


def evaluate(model):
    """Cosine of features on test images; higher is better."""
    images = torch.cat([images for images, _ in val])
    pair = (m.forward_features(images).flatten(1) for m in (model, former))
    return torch.cosine_similarity(*pair).mean().item()


config = Config(
    warmup_epochs=1, search_epochs=4, post_epochs=2, learning_rate=1e-3, search_learning_rate=1e-3
)
result = uvc.compress(model, train, budget=0.4, loss=loss, evaluate=evaluate, config=config)
print(f"cosine {result.before_post_score:.3f} after the search, {result.final_score:.3f} at the end")

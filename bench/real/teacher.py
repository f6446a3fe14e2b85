"""The dense teacher: DINOv2 with a linear classifier on its features, then fine-tuned as a whole."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.utils.data import DataLoader

from bench.real.setup import Setup
from uvc.training.compress import train_teacher
from uvc.training.logger import RunLog
from uvc.training.trainer import evaluate

PROBE_C = 0.03  # inverse weight decay of the linear classifier


def teacher(setup: Setup, seed: int) -> tuple[Path, dict[str, float]]:
    """The weights of a seed's teacher, and what is known of it: found, or trained now.

    A training that was stopped goes on after its last whole epoch.
    """
    config = replace(setup.seeded(seed), learning_rate=setup.teacher_rate)
    name = f"{setup.part}-{seed}-{config.teacher_epochs}-{config.learning_rate:g}-{setup.views.scale[0]:g}"
    file = setup.folder / "teachers" / f"{name}.safetensors"
    facts = file.with_suffix(".json")
    if not facts.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        data, checkpoint = setup.loaders(seed), file.with_suffix(".checkpoint")
        torch.manual_seed(seed)
        model = pretrained(setup, data.num_classes)
        start = time.process_time()
        probe(model, setup)
        found = {"probe_top1": evaluate(model, data.val)}
        found["top1"] = train_teacher(model, data.train, data.val, config, RunLog(None), checkpoint)
        save_file(model.state_dict(), file)
        facts.write_text(json.dumps({**found, "cpu_seconds": time.process_time() - start}))
        checkpoint.unlink(missing_ok=True)
    return file, json.loads(facts.read_text())


def pretrained(setup: Setup, classes: int) -> nn.Module:
    """The dense model with pretrained weights; its classifier is new."""
    model = setup.build(classes)
    weights = checkpoint_filter_fn(load_file(setup.weights), model)
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(missing) != {"head.weight", "head.bias"}:
        raise ValueError(
            f"weights: {str(setup.weights)!r} lacks {missing} and has {unknown}; run fetch again"
        )
    return model


@torch.no_grad()
def probe(model: nn.Module, setup: Setup) -> None:
    """Fits the classifier of `model` to the features of the training pictures, not augmented."""
    view = create_transform(**resolve_data_config({"input_size": (3, setup.size, setup.size)}, model=model))
    pictures = create_dataset("", root=str(setup.data / "train"), transform=view)
    model.eval()
    features, labels = [], []
    for images, answers in DataLoader(pictures, batch_size=setup.config.batch_size):
        features.append(model.forward_head(model.forward_features(images), pre_logits=True))
        labels.append(answers)
    fit = LogisticRegression(C=PROBE_C, max_iter=1000).fit(
        torch.cat(features).numpy(), torch.cat(labels).numpy()
    )
    model.head.weight.copy_(torch.from_numpy(fit.coef_))
    model.head.bias.copy_(torch.from_numpy(fit.intercept_))

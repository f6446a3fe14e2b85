"""The state of an unfinished run in one safetensors file: tensors by name, the rest as JSON in its metadata.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save_run(path: Path, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Writes groups of tensors and JSON facts; the file is whole or the old one stays."""
    flat = {
        f"{group}/{name}": t.detach().contiguous().clone()
        for group, part in tensors.items()
        for name, t in part.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file(flat, str(temporary), metadata={"facts": json.dumps(facts)})
    os.replace(temporary, path)


def load_run(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Inverse of ``save_run``; a file that is cut short or foreign is a ValueError that names it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable checkpoint of a run ({error}); delete it to start afresh"
        ) from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        group, _, key = name.partition("/")
        tensors.setdefault(group, {})[key] = tensor
    return tensors, facts


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimiser moments as "parameter name:moment name" -> tensor."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[p]}:{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def set_seed(seed: int, numpy: bool) -> None:
    """Seeds torch, and numpy's global generator if ``numpy``."""
    torch.manual_seed(seed)
    if numpy:
        np.random.seed(seed)


def numpy_random() -> dict[str, Tensor]:
    """The state of numpy's global generator as tensors."""
    _, key, position, has_gauss, gauss = np.random.get_state()
    return {
        "numpy_key": torch.from_numpy(key.astype(np.int64)),
        "numpy_place": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
    }


def set_numpy_random(tensors: dict[str, Tensor]) -> None:
    """Inverse of ``numpy_random``."""
    key = tensors["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, *tensors["numpy_place"].tolist(), float(tensors["numpy_gauss"])))


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, flat: dict[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``, for a fresh optimiser over the same model."""
    parameters = dict(model.named_parameters())
    for name, tensor in flat.items():
        parameter, _, key = name.rpartition(":")
        if parameter not in parameters:
            raise ValueError(
                f"checkpoint: optimiser state of unknown parameter {parameter!r}; it belongs to another model"
            )
        # The step count lies beside the parameter in a fused optimiser only.
        on_device = tensor.dim() > 0 or optimizer.defaults.get("fused")
        device = parameters[parameter].device if on_device else "cpu"
        optimizer.state[parameters[parameter]][key] = tensor.to(device)

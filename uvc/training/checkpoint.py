"""The state of an unfinished run in one safetensors file: tensors by name, the rest as JSON in its metadata.
Nothing is pickled.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from uvc.io.files import write_tensors

HELD = "held"  # the group of tensors that stand in the facts


def save_run(path: Path, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Writes groups of tensors and JSON facts; the file is whole or the old one stays."""
    held: dict[str, Tensor] = {}
    facts = _take_out(facts, held)
    flat = {
        f"{group}/{name}": t.detach().contiguous().clone()
        for group, part in {**tensors, HELD: held}.items()
        for name, t in part.items()
    }
    write_tensors(path, flat, {"facts": json.dumps(facts)})


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
    return tensors, _put_back(facts, tensors.pop(HELD, {}))


def _take_out(value: Any, held: dict[str, Tensor]) -> Any:
    """The value without its tensors, which go to ``held``: a loader's state may have some."""
    if isinstance(value, Tensor):
        held[str(len(held))] = value
        return {HELD: str(len(held) - 1)}
    if isinstance(value, dict):
        return {key: _take_out(item, held) for key, item in value.items()}
    return [_take_out(item, held) for item in value] if isinstance(value, (list, tuple)) else value


def _put_back(value: Any, held: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {HELD}:
            return held[value[HELD]]
        return {key: _put_back(item, held) for key, item in value.items()}
    return [_put_back(item, held) for item in value] if isinstance(value, list) else value


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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's, numpy's and Python's global generators, and of the device's, as tensors."""
    _, key, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy_key": torch.from_numpy(key.astype(np.int64)),
        "numpy_place": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of ``random_state``; generators that an older checkpoint did not know stay as they are."""
    torch.set_rng_state(tensors["torch"])
    if "numpy_key" in tensors:
        key = tensors["numpy_key"].numpy().astype(np.uint32)
        gauss = float(tensors["numpy_gauss"])
        np.random.set_state(("MT19937", key, *tensors["numpy_place"].tolist(), gauss))
    if "python" in tensors:
        version, *words = tensors["python"].tolist()
        next_gauss = next(iter(tensors["python_gauss"].tolist()), None)
        random.setstate((version, tuple(words), next_gauss))
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


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

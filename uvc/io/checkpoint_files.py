"""Files of weights as people have them, read without running code: safetensors, torch.save's, folders."""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from uvc.io.files import one_line

# What a folder may hold: of `uvc.save`, of timm's hub, of transformers in one file or in several.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where training programs put weights among other things; the first that is there is taken: averages and
# teachers before what they are averages of.
# fmt: off
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "teacher", "state_dict", "model_state_dict", "model",
    "module", "net", "network", "backbone", "target_encoder", "encoder",
)
# fmt: on
# First bytes of what is met in place of weights, and what to do about it.
IMPOSTORS = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<": "a page of the web; download the file itself",
    b"{": "JSON; name the file of the weights",
}


class Found(NamedTuple):
    """Weights, where in the file they stood, what else is there, and config.json beside them ({} if none)."""

    tensors: dict[str, Tensor]
    notes: list[str]
    config: dict[str, Any]


def read_weights(path: Path) -> Found:
    """The weights in a file, or in a folder that holds one.

    ValueError, in one line that names the file, for what is no such file, is cut short, or would need Python
    objects, whose unpickling runs code.
    """
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{str(path)!r} holds no weights; name a file, or a folder with {FILES[0]}")
    elif path.is_file():
        file = path
    else:
        raise ValueError(f"{str(path)!r} does not exist; name a file of weights or a folder that holds one")
    metadata: dict[str, str] = {}
    if file.name.endswith(".index.json"):
        raw = {name: value for part in _parts(file) for name, value in _read(part, metadata).items()}
    else:
        raw = _read(file, metadata)
    tensors, notes = _unwrap(raw, file)
    return Found(tensors, notes, _config(file, metadata))


def _parts(index: Path) -> list[Path]:
    """The files that an index of transformers names; they lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        beside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{str(index)!r} is no index of weights ({one_line(error)}); save it again"
        ) from None
    missing = [name for name in names if not beside or not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{str(index)!r} names {missing[0]!r}, which is not beside it; fetch all parts")
    return [index.parent / name for name in names]


def _read(file: Path, metadata: dict[str, str]) -> Mapping[str, Any]:
    """What a file holds, by its first bytes, whatever it is called."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {one_line(error)}") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                return {name: opened.get_tensor(name) for name in opened.keys()}
        except Exception as error:
            said = f"{str(file)!r} is no whole safetensors file ({one_line(error)}); save or fetch it again"
            raise ValueError(said) from None
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _torch_load(file, in_place=head[:1] == b"P")
    for start, meaning in IMPOSTORS.items():
        if head.lstrip().startswith(start):
            raise ValueError(f"{str(file)!r} is {meaning}")
    what = "is neither a safetensors file nor one of torch.save" if head else "is empty"
    raise ValueError(f"{str(file)!r} {what}; name a .safetensors, .pth, .pt or .bin file of weights")


def _torch_load(file: Path, in_place: bool) -> Any:
    try:
        # As timm does: many checkpoints carry the options they were trained with.
        with safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=in_place)
    except Exception as error:  # the unpickler answers broken bytes with whatever it runs into
        try:
            objects = sorted(get_unsafe_globals_in_checkpoint(str(file)))
        except Exception:
            objects = []
        objects = [name for name in objects if name != "argparse.Namespace"]
        if objects:
            raise ValueError(
                f"{str(file)!r} holds Python objects: {named(objects)}; reading those may run code; where it "
                "was written, save the state_dict() alone"
            ) from None
        if "TorchScript" in str(error):
            said = f"{str(file)!r} is a program (TorchScript); save the state_dict() of torch.jit.load of it"
            raise ValueError(said) from None
        raise ValueError(
            f"{str(file)!r} is no whole file of torch.save ({one_line(error):.120}); save or fetch it again"
        ) from None


def _unwrap(found: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, out of what training programs wrap around them."""
    notes: list[str] = []
    while isinstance(found, Mapping):
        inside = [name for name in WRAPPERS if isinstance(found.get(name), Mapping) and found[name]]
        if not inside:
            break
        if len(inside) > 1:
            notes.append(
                f"the weights are those of {inside[0]!r}; {', '.join(map(repr, inside[1:]))} not used"
            )
        found = found[inside[0]]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        held = type(found).__name__
        if isinstance(found, Mapping):
            held = f"{held} of {', '.join(map(str, list(found)[:6])) or 'nothing'}"
        raise ValueError(f"{str(file)!r} holds a {held}, no weights by name; save a state_dict()")
    tensors = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    if others := [str(name) for name in found if str(name) not in tensors]:
        notes.append(f"no tensors, not used: {named(others)}")
    for name, tensor in tensors.items():
        if fault := _fault(tensor):
            raise ValueError(f"{str(file)!r}: {name} {fault}; save plain, dense tensors")
    return tensors, notes


def _fault(tensor: Tensor) -> str | None:
    """Why a tensor does not hold its values one by one; None if it does."""
    if tensor.is_meta:
        return "has no values (it was saved on the meta device)"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantized"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has the shape {list(tensor.shape)} but fewer values"
    return None


def _config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """config.json beside a file of a usual name; one of `uvc.save` only if it was saved with this file."""
    beside = file.with_name("config.json")
    if file.name not in FILES or not beside.is_file():
        return {}
    try:
        text = beside.read_bytes()
        config = json.loads(text)
    except (OSError, ValueError):
        return {}
    ours = isinstance(config, dict) and str(config.get("format")).startswith("uvc-")
    if ours and metadata.get("config") != hashlib.sha256(text).hexdigest():
        raise ValueError(
            f"{str(file)!r} was saved with another config.json than the one beside it; save anew"
        )
    if ours and not (isinstance(config.get("arguments"), dict) and "structure" in config):
        raise ValueError(f"{str(beside)!r} does not describe a model; save it again with uvc.save")
    return config if isinstance(config, dict) else {}


def named(names: list[str], most: int = 3) -> str:
    """How many, and the first few."""
    return f"{len(names)} ({', '.join(names[:most])}{', ...' * (len(names) > most)})"

"""Models on disk: `model.safetensors` and `config.json`, each written whole, read without running code.

The config holds constructor arguments of one of timm's classes, or of `uvc.models`, read off the model, the
structure, what the model expects of its images, and the names of its classes.
"""

import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import create_model, is_model
from torch import nn

from uvc.compaction import compact, compacted, forms_of, in_form
from uvc.elastic import make_elastic, set_budget, structures_from_data, structures_of, structures_to_data
from uvc.io.card import Subject, write_card
from uvc.io.files import one_line, write_tensors, write_text
from uvc.io.finite import refuse_not_finite
from uvc.io.makers import MAKERS
from uvc.io.others import fill_from_new, name_of_other
from uvc.io.parts import ACTIVATIONS, BLOCKS, ENTRIES, MLPS, NORMS, PARTS, parts_of
from uvc.io.preprocessing import check_preprocessing, preprocessing_of, take_preprocessing
from uvc.layers import (
    cfg_of,
    check_children,
    convert,
    is_compacted,
    listed,
    meta_copy,
    named_blocks,
    replaced,
    sizes_of,
)
from uvc.structure import Structure, apply_structure, fit, structure_of

WEIGHTS, CONFIG, FORMAT = "model.safetensors", "config.json", "uvc-5"
# What older formats did not say, because they knew nothing else.
OLDER = {
    "uvc-1": {"format": FORMAT, "architecture": None, "mlp": "Mlp", "preprocessing": None, "form": None},
    "uvc-2": {"format": FORMAT, "preprocessing": None, "form": None},
    "uvc-3": {"format": FORMAT, "form": None},
    "uvc-4": {"format": FORMAT},
}
PADDED_HEADS = "uvc-4"  # had the zeros of padded heads in its files; since then weights are stored as kept
# fmt: off
FIELDS = {
    "format", "class", "architecture", "block", "norm", "mlp", "activation", "arguments", "compacted",
    "form", "structure", "preprocessing",
}
# fmt: on

# Attributes that tell how a model was initialised, is trained, or picks among equal kernels: not part of it.
UNSAVED = {
    "training",
    "weight_init_mode",
    "fix_init",
    "grad_checkpointing",
    "distilled_training",
    "fused_attn",
}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a compacted, converted or timm model to `folder`, which is made if need be.

    Beside it go a card, README.md, and a picture of the structure; a README.md of somebody else stays.

    ValueError, naming the part and before anything is written, when the model cannot be rebuilt from timm's
    constructor arguments, or a weight is NaN or infinite. ValueError when the folder cannot be written; what
    was there before stays whole.
    """
    refuse_not_finite(model.state_dict(), f"cannot save to {folder}")
    config = describe(model)
    name = cfg_of(model).get("architecture") or config["class"]
    text = json.dumps(config)
    if changed := [name or "the model" for name, module in model.named_modules() if has_own_calls(module)]:
        said = (
            f"hooks and forwards of their own are not saved: {', '.join(changed[:3])}, {len(changed)} in all"
        )
        warnings.warn(said, stacklevel=2)
    # The weights carry the digest of their config, so that files of two saves are never taken for one model.
    metadata = {"config": hashlib.sha256(text.encode()).hexdigest()}
    folder = Path(folder)
    try:
        write_tensors(folder / WEIGHTS, as_kept(model).state_dict(), metadata)
        write_text(folder / CONFIG, text)
        structure, plain = rebuild(config)  # without hooks and forwards of its own
        write_card(folder, Subject(name, plain, structure, config["preprocessing"] or {}, {}))
    except OSError as error:
        raise ValueError(f"cannot write a model: {one_line(error)}") from None


def load(folder: str | Path, device: str | torch.device = "cpu", budget: float | None = None) -> nn.Module:
    """The model that `save` wrote to `folder`, on `device`, in eval mode: same outputs, dtype and structure.

    A compacted model comes back compacted, any other converted; one with structures for several budgets at
    the largest, or, where `budget` names one of them, compacted at that. `pretrained_cfg`, where timm looks
    for it, says how images are prepared and, as "label_names", what the classes are called. ValueError, in
    one line that names the file, for a missing, truncated or foreign file; all sizes are checked before
    anything is allocated.
    """
    budget = None if budget is None else float(budget)
    weights_path = Path(folder) / WEIGHTS
    text, config, structure, model = _described(folder)
    forms = forms_of(model) if is_compacted(model) else None
    model, older = as_kept(model), config["format"] == PADDED_HEADS
    if older and forms is not None:
        model = in_form(model, forms, ("attn",))
    check_header(weights_path, model, hashlib.sha256(text.encode()).hexdigest())
    try:
        tensors = load_file(weights_path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {weights_path}: {one_line(error)}") from None
    model.load_state_dict(tensors, assign=True)
    fill_buffers(model, device)
    if older and forms is not None:
        model = in_form(model, "grouped", ("attn",))
    if forms is not None and set(forms) != {"grouped"}:
        model = in_form(model, forms)
    if not is_compacted(model):
        apply_structure(model, structure)
    if structures := structures_of(model):
        make_elastic(model, structures)
    if budget is not None:
        model = compact(set_budget(model, budget))
    return model.eval()


def as_kept(model: nn.Module) -> nn.Module:
    """The model whose weights are stored: without padding, so that a form, which depends on where it runs,
    changes no weight in a file.
    """
    padded = is_compacted(model) and set(forms_of(model)) != {"grouped"}
    return in_form(model, "grouped") if padded else model


def load_shapes(folder: str | Path) -> nn.Module:
    """The model in `folder` without its weights, on the meta device; ValueError as of `load`."""
    return _described(folder)[3]


def _described(folder: str | Path) -> tuple[str, dict[str, Any], Structure, nn.Module]:
    """The text of a folder's config, the config, and the structure and the model that it describes."""
    path = Path(folder) / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from None
    try:
        config = json.loads(text)
        return text, config, *rebuild(config)
    except Exception as error:  # timm's constructors answer wrong values with whatever they run into
        raise ValueError(f"{path} does not describe a model: {one_line(error)}") from None


def fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Compute, on `device`, the buffers of a loaded model that are in no file: tables of positions."""
    if name_of_other(model):
        return fill_from_new(model, device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for module in model.modules():
        missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if missing:
            module.init_non_persistent_buffers()
            module.to(dtype)


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of `model`; ValueError, naming the part, unless a rebuild from it gives the same modules."""
    other = name_of_other(model)
    kind = other or type(model).__name__
    maker = MAKERS.get(kind)
    if maker is None or (other is None and maker.make is not type(model)):
        raise ValueError(f"cannot save a {type(model).__name__}; {', '.join(MAKERS)} can be saved")
    check_children(model, hooks=False)
    if is_compacted(model):
        dense = meta_copy(model, replaced(model, [block.origin for block in listed(model).values()]))
    else:
        dense = convert(meta_copy(model))
    name, block = next(iter(named_blocks(dense).items()))
    config = {
        "format": FORMAT,
        "class": kind,
        "architecture": None,
        **(parts_of(block, name) if maker.parts else PARTS),
        "arguments": maker.read(dense),
        "compacted": is_compacted(model),
        "form": list(forms_of(model)) if is_compacted(model) else None,
        "structure": structure_of(model).to_data(),
        "preprocessing": preprocessing_of(model),
    }
    if structures := structures_of(model):
        # The largest, whatever the model stands at.
        config["structure"] = next(iter(structures.values())).to_data()
        config["structures"] = structures_to_data(structures)
    depth = len(listed(dense))
    try:
        compare(dense, rebuild_dense(config, depth))
    except ValueError:
        # What the class alone does not make (the ResNet stem of a hybrid), timm's function for the model may.
        name = cfg_of(model).get("architecture") or ""
        if not is_model(name):
            raise
        config["architecture"] = name
        compare(dense, rebuild_dense(config, depth))
    if config["compacted"]:
        # What its blocks were made from is known; here, that they are still what was made.
        compare(model, rebuild(config)[1])
    return config


def has_own_calls(module: nn.Module) -> bool:
    """Whether calling a module does what its class does not: a hook from outside, or a forward of its own."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    mine = (str(getattr(hook, "__module__", "")).startswith("uvc.") for hook in hooks)
    return "forward" in vars(module) or not all(mine)


def rebuild(config: object) -> tuple[Structure, nn.Module]:
    """The structure and the model, on the meta device, that a config describes; an exception if none."""
    if isinstance(config, dict):
        config = {**config, **OLDER.get(config.get("format"), {})}
    if not isinstance(config, dict) or set(config) - {"structures"} != FIELDS:
        raise ValueError(f"expected an object with the fields {', '.join(sorted(FIELDS))}")
    if config["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}, got {config['format']!r}")
    structure = Structure.from_data(config["structure"])
    dense = rebuild_dense(config, len(structure.blocks) // ENTRIES.get(config["block"], 1))
    fit(structure, sizes_of(dense))
    if "structures" in config:
        if config["compacted"]:
            raise ValueError("structures: a compacted model has one alone")
        make_elastic(dense, structures_from_data(config["structures"]))
    if config["preprocessing"] is not None:
        check_preprocessing(config["preprocessing"], dense)
        take_preprocessing(dense, config["preprocessing"])
    if not config["compacted"]:
        return structure, dense
    return structure, compacted(dense, structure, "grouped" if config["form"] is None else config["form"])


def rebuild_dense(config: dict[str, Any], depth: int) -> nn.Module:
    """The converted model without weights, on the meta device, of `depth` blocks."""
    tables = {"class": MAKERS, "block": BLOCKS, "mlp": MLPS, "activation": ACTIVATIONS}
    for field, table in tables.items():
        if config[field] not in table:
            raise ValueError(f"{field} must be one of {', '.join(table)}, got {config[field]!r}")
    if config["norm"]["name"] not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {config['norm']['name']!r}")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config["arguments"].items()}
    maker, name = MAKERS[config["class"]], config["architecture"]
    block = BLOCKS.index(config["block"])
    if block >= len(maker.blocks):
        raise ValueError(f"block: a {config['class']} has no {config['block']}")
    for argument in sorted(maker.arguments ^ (arguments.keys() - maker.optional)):
        raise ValueError(f"{'missing' if argument in maker.arguments else 'unknown'} argument {argument}")
    make = maker.make
    if name is not None:
        # Only a registered name: timm would take others for addresses of code and weights.
        if not isinstance(name, str) or not is_model(name):
            raise ValueError(f"architecture must be a model of timm, got {name!r:.60}")
        make = functools.partial(create_model, name)
    with torch.device("meta"):
        parts = {
            "weight_init": "skip",
            "norm_layer": functools.partial(NORMS[config["norm"]["name"]], eps=config["norm"]["eps"]),
            "mlp_layer": MLPS[config["mlp"]],
            "act_layer": ACTIVATIONS[config["activation"]],
            "block_fn": maker.blocks[block],
            "depth": depth,
        }
        model = make(**arguments, **{part: parts[part] for part in maker.parts})
    return convert(model)


def compare(saved: nn.Module, rebuilt: nn.Module) -> None:
    """ValueError, naming the first module that differs in type, settings or sizes."""
    modules = dict(saved.named_modules(remove_duplicate=False))
    for name, module in rebuilt.named_modules(remove_duplicate=False):
        mine, where = modules.get(name), name or "the model"
        if type(mine) is not type(module):
            made = type(module).__name__
            raise ValueError(f"cannot save: {where} is a {type(mine).__name__} where timm makes a {made}")
        settings = settings_of(mine)
        for key, made in settings_of(module).items():
            if settings.get(key) != made:
                raise ValueError(f"cannot save: {where} has {key} {settings.get(key)!r}, timm makes {made!r}")
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (saved, rebuilt)]
    for name in shapes[0].keys() | shapes[1].keys():
        if shapes[0].get(name) != shapes[1].get(name):
            raise ValueError(f"cannot save: {name} is not what timm's constructor makes")


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The public attributes of a module that are plain values."""
    plain = (bool, int, float, str, tuple, type(None))
    public = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in UNSAVED}
    return {k: v for k, v in public.items() if isinstance(v, plain)}


def check_header(path: Path, model: nn.Module, digest: str) -> None:
    """ValueError naming the file unless it holds the tensors of `model`, saved with this config."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from None
    floats = ("a float", ("F64", "F32", "F16", "BF16"))
    expected = {
        name: (tuple(tensor.shape), *(floats if tensor.is_floating_point() else ("an I64", ("I64",))))
        for name, tensor in model.state_dict().items()
    }
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            raise ValueError(f"{path} {'lacks' if name in expected else 'has the unknown tensor'} {name}")
        (shape, dtype), (right, kind, dtypes) = found[name], expected[name]
        if shape != right or dtype not in dtypes:
            raise ValueError(f"{path} has {name} as {dtype} {list(shape)}, not {kind} {list(right)}")
    if metadata.get("config") != digest:
        raise ValueError(f"{path} was saved with another {CONFIG} than the one beside it")

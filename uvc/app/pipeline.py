"""A whole run from options to files: data, model, teacher, compression, and what is left in the folder."""

import copy
import difflib
import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import uvc.models  # noqa: F401  registers the models that timm does not have
from uvc.app.run_dir import (
    OPTIONS,
    SUMMARY,
    check_out,
    load_weights,
    merge_options,
    open_out,
    read_json,
    save_weights,
)
from uvc.app.summary import draw_structure
from uvc.compaction import compact
from uvc.config import Config
from uvc.constraints import check_grain, limits, named_budgets, reachable
from uvc.costs import cost
from uvc.environment import choose_device, device_name, versions
from uvc.io.files import write_json
from uvc.io.preprocessing import cfg_of, check_classes, note_data
from uvc.io.serialization import describe, load
from uvc.latency_table import LatencyTable, measure, measure_latency, verify
from uvc.layers import convert
from uvc.recipes import AIMS, RECIPES
from uvc.solver import check_tokens
from uvc.structure import Structure
from uvc.training.compress import LATENCY, compress, train_teacher
from uvc.training.data import DEFAULT_MODELS, DIGITS, Data, check_name, load_data
from uvc.training.evaluation import count_right, evaluate
from uvc.training.logger import RunLog

LATENCY_BATCHES = (1, 64)
CHECKPOINT = "checkpoint.safetensors"
# Options that are named as fields of Config; None leaves the recipe's value.
CONFIG_FIELDS = {
    "teacher_epochs": "teacher_epochs",
    "warmup_epochs": "warmup_epochs",
    "search_epochs": "search_epochs",
    "post_epochs": "post_epochs",
    "batch_size": "batch_size",
    "lr": "learning_rate",
    "seed": "seed",
    "precision": "precision",
}


def compress_run(
    out: Path,
    options: Mapping[str, Any],
    *,
    resume: bool = False,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> dict:
    """Compress as the command-line `options` say (None: default), write the run folder, return the summary.

    `say` gets a line for each metric: what budgets can be reached.

    All that can be wrong is checked before `out` is touched: ValueError or RuntimeError, one line each.
    """
    check_out(out, resume)
    if resume:
        options = merge_options(out, options)
        if (out / SUMMARY).is_file():
            return read_summary(out)
    started = time.monotonic()
    config = _config(options)
    device = choose_device(options["device"], options["threads"] or config.threads)
    aim = AIMS.get(options["recipe"])
    if aim and not options["data"]:
        raise ValueError(f"--data: none given; --recipe {options['recipe']} is for ImageNet, name its folder")
    data_name = options["data"] or DIGITS
    check_name(data_name)
    model_name = known_model(options["model"] or (aim and aim.model), data_name)
    budget, metric = (_given_or_default(options, name) for name in ("budget", "metric"))
    if aim and options["budget"] is None and options["metric"] in (None, "macs"):
        budget = aim.budget
    data = _data(data_name, _model_input(model_name), config.batch_size, config.seed, options)
    torch.manual_seed(config.seed)
    model = convert(timm.create_model(model_name, num_classes=data.num_classes)).to(device)
    note_data(model, data.view, data.classes)
    check_grain(model, config.solver.grain)
    check_tokens(model, config.solver.tokens, tuple(named_budgets(budget, metric)))
    table = _latency_table(model, options, budget, metric, config, out)
    limits(model, budget, metric, table)
    describe(model)  # what cannot be saved is better said now than after the training
    if options["teacher"]:
        load_weights(model, Path(options["teacher"]))
    open_out(out, options)
    if say is not None:
        for line in reachable(model, table, config.solver.grain):
            say(f"reachable {line}")
        if aim and aim.model == model_name:
            say(f"published by others, not ours: {aim.published}")

    with RunLog(out, progress) as log:
        if not options["teacher"]:
            _make_teacher(model, data, config, out, log)
        teacher = copy.deepcopy(model)
        # A run that is resumed after its teacher sees the batches of a run in one go.
        data.train.load_state_dict({"epoch": config.teacher_epochs, "batch": 0})
        result = compress(
            model, data.train, data.val, budget, metric, teacher, config, out, log, resume, table
        )
    small = compact(result.model)
    summary = {
        "model": model_name,
        "data": data.name,
        "seed": config.seed,
        "budget": budget,
        "metric": metric if isinstance(budget, float) else ",".join(budget),
        "dense_macs": result.dense_cost.macs,
        "final_macs": result.cost.macs,
        "macs_ratio": result.cost.macs / result.dense_cost.macs,
        "dense_params": result.dense_cost.params,
        "final_params": result.cost.params,
        "teacher_top1": result.teacher_top1,
        "before_post_top1": result.before_post_top1,
        "final_top1": evaluate(small, data.val, device),
        "steps": result.steps,
        "seconds": time.monotonic() - started,
        "device": device_name(device) if device.type == "cuda" else "cpu",
        "latency": _latency(teacher, small, data, device),
        **({"latency_budget": _latency_check(table, teacher, small)} if table else {}),
        "versions": versions(),
        "structure": json.loads(result.structure.to_json()),
    }
    draw_run(out, summary)
    # Last: a folder with a summary is a finished run.
    write_json(out / SUMMARY, summary)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return summary


def measure_run(to: Path, options: Mapping[str, Any]) -> LatencyTable:
    """Measure the latency table of a model as the command-line `options` say, and write it to a file."""
    if not to.absolute().parent.is_dir() or to.is_dir():
        raise ValueError(f"FILE: {str(to)!r} cannot be written; name a file in a folder that exists")
    device = choose_device(options["device"], options["threads"])
    model = timm.create_model(known_model(options["model"], "")).to(device)
    grain = tuple(options["grain"] or (1, 1))
    check_grain(model, grain)
    table = measure(model, options["batch_size"] or 1, grain)
    to.write_text(table.to_json())
    return table


def evaluate_run(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Top-1 accuracy, images, MACs and parameters of the model that `uvc.save` left in a folder."""
    model = load(folder)
    summary = read_summary(folder) if (folder / SUMMARY).is_file() else {}
    data_name = options["data"] or summary.get("data", DIGITS)
    if options["data"] is None and options["data_root"] is None and (folder / OPTIONS).is_file():
        options = {**options, "data_root": read_json(folder / OPTIONS).get("data_root")}
    known = cfg_of(model) or (_model_input(summary["model"]) if "model" in summary else {})
    size = (model.in_chans, *model.patch_embed.img_size)
    config = RECIPES.get(data_name, RECIPES["default"])()
    device = choose_device(options["device"], options["threads"] or config.threads)
    batch_size = options["batch_size"] or config.batch_size
    data = _data(data_name, {**known, "input_size": size}, batch_size, config.seed, options)
    if data.num_classes != model.num_classes:
        raise ValueError(
            f"--data: {data_name!r} has {data.num_classes} classes, the model has {model.num_classes}"
        )
    check_classes(model, data.classes)
    figures = cost(model)
    right, images = count_right(model.to(device), data.val, device)
    return {
        "top1": 100.0 * right / images,
        "images": images,
        "data": data_name,
        "macs": figures.macs,
        "params": figures.params,
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a finished run; ValueError when there is none."""
    if not (folder / SUMMARY).is_file():
        raise ValueError(
            f"DIR: {str(folder)!r} holds no finished run; finish it with uvc compress --resume --out"
        )
    return read_json(folder / SUMMARY)


def draw_run(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `structure.png` from the model and the structure in a run folder."""
    structure = Structure.from_json((folder / "structure.json").read_text())
    title = f"{summary['model']} on {summary['data']}: {summary['macs_ratio']:.1%} of the MACs kept"
    draw_structure(structure, Structure.dense(load(folder)), folder / "structure.png", title)


def _config(options: Mapping[str, Any]) -> Config:
    name = options["recipe"] or (options["data"] or DIGITS)
    if options["recipe"] and name not in RECIPES:
        raise ValueError(f"--recipe: {name!r} is unknown; use one of {', '.join(RECIPES)}")
    config = RECIPES.get(name, RECIPES["default"])()
    given = {field: options[name] for name, field in CONFIG_FIELDS.items() if options.get(name) is not None}
    solver = {name: options[name] for name in ("skip", "grain", "tokens") if options.get(name)}
    if "grain" in solver:
        solver["grain"] = tuple(solver["grain"])
    given["solver"] = replace(config.solver, **solver)
    distill = {"kind": options["distill"], "features": options.get("distill_features")}
    distill = replace(config.distill, **{k: v for k, v in distill.items() if v is not None})
    if distill.features and distill.kind == "none":
        raise ValueError(f"--distill-features: {distill.features} has no teacher; leave out --distill none")
    given["distill"] = distill
    return replace(config, **given)


def known_model(name: str | None, data: str) -> str:
    """`name`, or the model that `data` defaults to; ValueError for one that timm does not have."""
    if name is None and data not in DEFAULT_MODELS:
        raise ValueError(
            f"--model: none given for --data {data!r}; name a timm model such as deit_tiny_patch16_224"
        )
    name = name or DEFAULT_MODELS[data]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"--model: {name!r} is no timm model; {hint}")
    return name


def _model_input(model_name: str) -> dict[str, Any]:
    found = timm.get_pretrained_cfg(model_name)
    return found.to_dict() if found is not None else {"input_size": (3, 224, 224)}


def _data(
    name: str, model_input: Mapping[str, Any], batch_size: int, seed: int, options: Mapping[str, Any]
) -> Data:
    more = {
        key: value
        for key, value in (("workers", options["workers"]), ("root", options["data_root"]))
        if value
    }
    return load_data(name, model_input=model_input, batch_size=batch_size, seed=seed, **more)


def _given_or_default(options: Mapping[str, Any], name: str) -> Any:
    given = options[name]
    return inspect.signature(compress).parameters[name].default if given is None else given


def _make_teacher(model: nn.Module, data: Data, config: Config, out: Path, log: RunLog) -> None:
    """Train the teacher, or take up the one that this run had trained before it was interrupted."""
    weights, checkpoint = out / "teacher" / "model.safetensors", out / "teacher" / CHECKPOINT
    if weights.is_file():
        load_weights(model, weights)
        return
    train_teacher(model, data.train, data.val, config, log, checkpoint)
    save_weights(model, weights)
    checkpoint.unlink(missing_ok=True)


def _latency_table(
    model: nn.Module,
    options: Mapping[str, Any],
    budget: float | Mapping[str, float],
    metric: str,
    config: Config,
    out: Path,
) -> LatencyTable | None:
    """The table of a budget in latency: the given one, that of the run to resume, or one measured now."""
    given = options["latency_table"]
    if "latency" not in named_budgets(budget, metric):
        if given or options["latency_batch"]:
            raise ValueError(
                "--latency-table, --latency-batch: no budget is in latency; add --metric latency"
            )
        return None
    if given and options["latency_batch"]:
        raise ValueError(
            f"--latency-batch: {options['latency_batch']}, but --latency-table has its own; leave it out"
        )
    file = Path(given) if given else out / LATENCY
    if given or file.is_file():
        table = LatencyTable.load(file)
        table.check(model)
        return table
    return measure(model, options["latency_batch"] or 1, config.solver.grain)


def _latency_check(table: LatencyTable, teacher: nn.Module, small: nn.Module) -> dict[str, Any]:
    check = verify(table, teacher, small)
    return {
        "batch": table.batch,
        "table_device": table.device,
        "predicted_ratio": check.predicted,
        "measured_ratio": check.measured,
        "teacher_ms": check.dense_ms,
        "compressed_ms": check.compacted_ms,
    }


def _latency(
    teacher: nn.Module, small: nn.Module, data: Data, device: torch.device
) -> list[dict[str, float]]:
    figures = []
    for batch in LATENCY_BATCHES:
        images = torch.randn(batch, *data.input_size, device=device)
        times = measure_latency({"teacher": teacher, "compressed": small}, images)
        figures.append({"batch": batch, "teacher_ms": times["teacher"], "compressed_ms": times["compressed"]})
    return figures

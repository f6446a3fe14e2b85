"""A whole run from its config to files: data, model, teacher, compression, and what is left in the folder."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from uvc.app.block_times import PARTS, block_times
from uvc.app.resolve import known_model, stored_run
from uvc.app.run_dir import OPTIONS, SUMMARY, check_out, open_out, read_json
from uvc.app.summary import draw_structure
from uvc.compaction import compact, form_for
from uvc.config import DataConfig, RunConfig
from uvc.constraints import check_multiples, reachable
from uvc.costs import cost
from uvc.elastic import set_budget
from uvc.environment import choose_device, device_name, versions
from uvc.io.card import Subject, write_card
from uvc.io.dtypes import check_runs
from uvc.io.files import one_line, write_json, write_text
from uvc.io.finite import refuse_not_finite
from uvc.io.preprocessing import check_classes, check_names, note_data, preprocessing_of
from uvc.io.serialization import CONFIG as MODEL
from uvc.io.serialization import load, save
from uvc.io.weights import take_weights, warn
from uvc.latency_table import LatencyTable, measure, measure_latency, verify
from uvc.layers import cfg_of, convert, image_of, set_image, set_tokens, takes_any_size
from uvc.recipes import AIMS, RECIPES
from uvc.structure import Structure, structure_of
from uvc.training.checkpoint import delete_run
from uvc.training.compress import Result, carry_out, train_teacher
from uvc.training.data import Data, load_data
from uvc.training.evaluation import count_right, evaluate
from uvc.training.logger import RunLog
from uvc.training.multiples import settle
from uvc.training.plan import Plan
from uvc.training.processes import Alone, here
from uvc.training.trackers import check_trackers

LATENCY_BATCHES = (1, 64)
CHECKPOINT = "checkpoint.safetensors"
TEACHER = "teacher"  # folder in the folder of a run


def compress_run(
    run: RunConfig, *, progress: bool = False, say: Callable[[str], object] = lambda line: None
) -> dict[str, Any] | None:
    """Compress as `run` says, write the folder `run.out`, return the summary; of several processes in rank 0.

    `say` gets a line for each metric: what budgets can be reached. All that can be wrong is checked before
    `out` is touched: ValueError or RuntimeError, one line each.
    """
    if run.out is None:
        raise ValueError("--out: none given; name a new or empty folder for the run")
    out, started = Path(run.out), time.monotonic()
    check_out(out, run.resume)
    check_trackers(run.trackers)
    if run.resume and (out / SUMMARY).is_file():
        return read_summary(out)
    device = choose_device(run.device, run.threads)
    processes = here(device.type, run.threads)
    processes.wait()  # what is in `out` has been looked at by all before one writes there
    device = processes.device or device
    data = _data(run, _model_input(run))
    torch.manual_seed(run.seed)
    model, trained = _begin(run, data, out)
    model = convert(model).to(device)
    note_data(model, data.view, data.classes)
    plan = Plan(
        model,
        data.train,
        data.val,
        run.budget,
        run.metric,
        run.training,
        out=out,
        resume=run.resume,
        latency=LatencyTable.load(Path(run.latency_table)) if run.latency_table else None,
        latency_batch=run.latency_batch,
        teacher_cache=Path(run.teacher_cache) if run.teacher_cache else None,
        processes=processes,
    )
    with processes.in_turn():
        open_out(out, run)
    for line in reachable(model, plan.latency, plan.config.solver.round_to):
        say(f"reachable {line}")
    aim = AIMS.get(run.recipe)
    if aim and aim.model == run.model:
        say(f"published by others, not ours: {aim.published}")

    with RunLog(out, progress, run.trackers) if processes.main else RunLog(None) as log:
        plan.begin(log)
        if not trained:
            _make_teacher(model, data, plan, out, log)
        elif run.pretrained and processes.main:
            save(model, out / TEACHER)  # a resumed run needs no hub
        # A run that is resumed after its teacher sees the batches of a run in one go.
        data.train.load_state_dict({"epoch": run.training.teacher_epochs, "batch": 0})
        result = carry_out(plan, log)
    small = compact(result.model, form_for(device))
    top1 = evaluate(small, data.val, device, processes.total)
    rows = [_row(result, budget, data, device, processes) for budget in result.structures]
    if not processes.main:
        return None
    summary = _summary(run, plan, data, result, small, top1) | ({"budgets": rows} if rows else {})
    summary["seconds"] = time.monotonic() - started
    draw_run(out, summary)
    model = load(out)
    images = preprocessing_of(model) or {}
    write_card(out, Subject(run.model, model, structure_of(model), images, summary))
    # Last: a folder with a summary is a finished run.
    write_json(out / SUMMARY, summary)
    delete_run(out / CHECKPOINT)
    return summary


def measure_run(
    to: Path,
    model: str,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    round_to: tuple[int, int] | str | None = None,
) -> LatencyTable:
    """Measure the latency table of a timm model and write it to a file; None: one image, multiples of 1.

    round_to: "auto": multiples that are measured first.
    """
    if not to.absolute().parent.is_dir() or to.is_dir():
        raise ValueError(f"FILE: {str(to)!r} cannot be written; name a file in a folder that exists")
    place = choose_device(device, threads)
    made = timm.create_model(known_model(model)).to(place)
    batch = 1 if batch_size is None else batch_size
    multiples = settle(made, batch)[:2] if round_to == "auto" else round_to or (1, 1)
    check_multiples(made, multiples)
    table = measure(made, batch, multiples)
    write_text(to, table.to_json())
    return table


def evaluate_run(
    folder: Path,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    budget: float | None = None,
) -> dict[str, Any]:
    """Top-1 accuracy, images, MACs and parameters of the model that `uvc.save` left in a folder.

    What is None is as in the run that made the folder, the device aside, which is the CPU, and the budget:
    of several the largest.
    """
    model = load(folder, budget=budget)
    opened, name, place = data_of(folder, model, data, data_root, device, threads, batch_size, workers)
    check_runs(model)
    figures = cost(model)
    right, images = count_right(model.to(place), opened.val, place)
    return {
        "top1": 100.0 * right / images,
        "images": images,
        "data": name,
        "macs": figures.macs,
        "params": figures.params,
    }


def data_of(
    folder: Path,
    model: nn.Module,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> tuple[Data, str, torch.device]:
    """The data of the run in a folder, or others, as its model takes them, their name, and the device."""
    run, wants = RunConfig(training=RECIPES["digits"]()), {}
    if (folder / OPTIONS).is_file():
        run = stored_run(folder)
        wants = _model_input(run)
    if data is not None and data != run.data:
        training = RECIPES.get(data, RECIPES["default"])()
        run = replace(run, data=data, data_root=None, images=DataConfig(), training=training)
    changes = {"data_root": data_root, "workers": workers}
    run = replace(run, **{name: value for name, value in changes.items() if value is not None})
    changes = {"batch_size": batch_size, "threads": threads}
    training = replace(run.training, **{k: v for k, v in changes.items() if v is not None})
    place = choose_device(device, training.threads)
    wants = cfg_of(model) or wants
    wants["input_size"] = image_of(model)
    opened = _data(replace(run, training=training), wants)
    if opened.num_classes != model.num_classes:
        raise ValueError(
            f"--data: {run.data!r} has {opened.num_classes} classes, the model has {model.num_classes}"
        )
    check_classes(model, opened.classes)
    return opened, run.data, place


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


def _model(run: RunConfig, num_classes: int, pretrained: bool = False) -> nn.Module:
    """The timm model of a run; ValueError for arguments that it does not take."""
    arguments, size = dict(run.model_args), run.images.input_size
    if "num_classes" in arguments:
        raise ValueError("--model-arg: num_classes comes from the data; leave it out")
    if size is not None:
        if _input_size(size, arguments) != size:
            raise ValueError(f"--input-size: {size}, but --model-arg says otherwise; leave one of them out")
        arguments |= {"in_chans": size[0], "img_size": size[1:]}
    make = partial(timm.create_model, run.model, pretrained=pretrained, num_classes=num_classes)
    if pretrained or not arguments:
        return _sized(_made(make, arguments, size), run)
    try:
        model = _made(make, arguments, size)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model-arg: {run.model} cannot be made with {arguments}: {one_line(error)}"
        ) from None
    return _sized(model, run)


def _made(
    make: Callable[..., nn.Module], arguments: dict[str, Any], size: tuple[int, int, int] | None
) -> nn.Module:
    """A model of these arguments; one for images of any size may take no size when it is made."""
    try:
        return make(**arguments)
    except TypeError as error:
        if size is None or "img_size" not in str(error):
            raise
        model = make(**{name: value for name, value in arguments.items() if name != "img_size"})
        if not takes_any_size(model):
            raise
        return model


def _sized(model: nn.Module, run: RunConfig) -> nn.Module:
    """A model that takes images of any size with the size of a run's images; another as it is."""
    tokens, size = run.images.tokens_per_image, run.images.input_size
    if tokens is not None and size is not None:
        raise ValueError("--tokens-per-image: --input-size says how many there are; leave one of them out")
    if tokens is not None:
        return set_tokens(model, tokens)
    if not takes_any_size(model):
        return model
    return set_image(model, _input_size(image_of(model), run.model_args) if size is None else size)


def _model_input(run: RunConfig) -> dict[str, Any]:
    """What the model of a run takes, as timm's `pretrained_cfg` has it."""
    found = timm.get_pretrained_cfg(run.model)
    wants = found.to_dict() if found is not None else {"input_size": (3, 224, 224)}
    if run.images.tokens_per_image is not None:
        with torch.device("meta"):
            return {**wants, "input_size": image_of(_model(run, 1))}
    return {**wants, "input_size": _input_size(wants["input_size"], run.model_args)}


def _data(run: RunConfig, model_input: Mapping[str, Any]) -> Data:
    return load_data(
        run.data,
        model_input=model_input,
        batch_size=run.training.batch_size,
        seed=run.seed,
        workers=run.workers,
        root=run.data_root,
        views=run.images,
    )


def _input_size(size: tuple[int, int, int], args: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of a model made with these arguments."""
    images = args.get("img_size", size[1:])
    height, width = images if isinstance(images, tuple) else (images, images)
    return (args.get("in_chans", size[0]), height, width)


def _begin(run: RunConfig, data: Data, out: Path) -> tuple[nn.Module, bool]:
    """The model with its teacher's weights, as far as there are any, and whether they need no training.

    A teacher that this run had trained before it was interrupted comes first.
    """
    model = _model(run, data.num_classes)
    if (out / TEACHER / MODEL).is_file():  # which is written last
        take_weights(model, out / TEACHER)
        return model, True
    if run.pretrained:
        return _pretrained(model, run, data)
    if run.teacher is None:
        return model, False
    try:
        found = take_weights(model, Path(run.teacher))
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from None
    if found.left:
        _check_time(run, f"--teacher: {run.teacher!r} has no {found.left[0]} for {data.num_classes} classes")
    check_names(found.classes, data.classes, "the teacher")
    warn(found, run.teacher)
    return model, not found.left


def _pretrained(model: nn.Module, run: RunConfig, data: Data) -> tuple[nn.Module, bool]:
    """`_begin` with the weights that timm has of `model`."""
    classes = cfg_of(model).get("num_classes")
    if classes != data.num_classes:
        _check_time(run, f"--pretrained: {run.model} is for {classes} classes, not {data.num_classes}")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # each try to reach it would be a line
    try:
        model = _model(run, data.num_classes, pretrained=True)
    except Exception as error:  # clients of hubs fail as the network does, in many ways
        raise ValueError(
            f"--pretrained: no weights of {run.model} can be had ({one_line(error):.200}); give a file of "
            "weights, --teacher FILE"
        ) from None
    finally:
        hub.setLevel(level)
    refuse_not_finite(model.state_dict(), f"--pretrained: {run.model}")
    return model, classes == data.num_classes


def _check_time(run: RunConfig, why: str) -> None:
    """ValueError when the classifier is new and no epochs would train it."""
    if not run.training.teacher_epochs:
        raise ValueError(
            f"{why}, and with --teacher-epochs 0 its classifier is not trained; give epochs, or weights with "
            "these classes"
        )


def _make_teacher(model: nn.Module, data: Data, plan: Plan, out: Path, log: RunLog) -> None:
    """Train the teacher and keep it for a run that goes on."""
    checkpoint = out / TEACHER / CHECKPOINT
    train_teacher(model, data.train, data.val, plan.config, log, checkpoint, plan.processes)
    if plan.processes.main:
        save(model, out / TEACHER)
        delete_run(checkpoint)


def _summary(
    run: RunConfig, plan: Plan, data: Data, result: Result, small: nn.Module, top1: float
) -> dict[str, Any]:
    """The figures of a finished run. small: the compacted model, of which top1 was counted."""
    device = next(result.model.parameters()).device
    return {
        "model": run.model,
        "data": data.name,
        "seed": run.seed,
        "budget": run.budget,
        "metric": ",".join(run.budgets),
        "dense_macs": result.dense_cost.macs,
        "final_macs": result.cost.macs,
        "macs_ratio": result.cost.macs / result.dense_cost.macs,
        "dense_params": result.dense_cost.params,
        "final_params": result.cost.params,
        "teacher_top1": result.teacher_top1,
        "before_post_top1": result.before_post_top1,
        "final_top1": top1,
        "steps": result.steps,
        "processes": plan.processes.count,
        "precision": result.precision,
        "device": device_name(device) if device.type == "cuda" else "cpu",
        "latency": _latency(result.teacher, small, data, device),
        "block_ms": _block_ms(result.teacher, small, data, device),
        **({"latency_budget": _latency_check(plan.latency, result.teacher, small)} if plan.latency else {}),
        "versions": versions(),
        "structure": json.loads(result.structure.to_json()),
    }


def _row(result: Result, budget: float, data: Data, device: torch.device, processes: Alone) -> dict[str, Any]:
    """The figures of a finished run at one of its budgets."""
    small = compact(set_budget(result.model, budget))
    set_budget(result.model, next(iter(result.structures)))
    figures, dense = cost(small), result.dense_cost
    return {
        "budget": budget,
        "macs": figures.macs,
        "macs_ratio": figures.macs / dense.macs,
        "params": figures.params,
        "params_ratio": figures.params / dense.params,
        "before_post_top1": result.before_post_scores[budget],
        "final_top1": evaluate(small, data.val, device, processes.total),
    }


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


def _block_ms(teacher: nn.Module, small: nn.Module, data: Data, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each block with one image; hooks on blocks are none of a teacher's or a model's own."""
    images = torch.randn(1, *data.input_size, device=device)
    return {"batch": 1, "parts": PARTS, **block_times({"teacher": teacher, "compressed": small}, images)}


def _latency(
    teacher: nn.Module, small: nn.Module, data: Data, device: torch.device
) -> list[dict[str, float]]:
    figures = []
    for batch in LATENCY_BATCHES:
        images = torch.randn(batch, *data.input_size, device=device)
        times = measure_latency({"teacher": teacher, "compressed": small}, images)
        figures.append({"batch": batch, "teacher_ms": times["teacher"], "compressed_ms": times["compressed"]})
    return figures

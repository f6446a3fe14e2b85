"""The options of `uvc compress`, as its help lists them."""

from collections.abc import Callable

import click

from uvc.app.options import (
    FOLDER,
    Renamed,
    data_options,
    image_options,
    read_budget,
    read_model_args,
    read_multiples,
    read_resume,
)

OPTIONS: tuple[Callable, ...] = (
    click.option("--out", help="Folder of the run: new or empty; with --resume, begun."),
    click.option(
        "--config", type=FOLDER, help="Settings in TOML, under those given here; see --show-config."
    ),
    click.option(
        "--show-config", is_flag=True, help="Print all settings as TOML, for --config; run nothing."
    ),
    click.option("--model", help="A timm model name; digits has a small ViT of its own."),
    click.option(
        "--model-arg",
        multiple=True,
        callback=read_model_args,
        metavar="NAME=VALUE",
        help="An argument of timm.create_model, as in img_size=112; may be repeated.",
    ),
    data_options,
    image_options,
    click.option(
        "--budget",
        callback=read_budget,
        help="Fraction of the dense cost that may remain; or macs=0.5,params=0.6; or 0.7,0.5, nested.",
    ),
    click.option("--metric", metavar="macs|params|latency", help="What a single fraction counts."),
    click.option("--latency-table", help="latency.json of a run, or of uvc latency, to budget by."),
    click.option("--latency-batch", type=int, help="Images per forward pass in the table measured here; 1."),
    click.option(
        "--round-to",
        "--grain",
        "round_to",
        cls=Renamed,
        callback=read_multiples,
        help="Keep head dims and neurons in multiples, as in 16,64; auto: those measured to run well here.",
    ),
    click.option("--seed", type=int, help="Seed of weights, order and augmentation."),
    click.option("--recipe", help="Named settings: default, digits, deit_small_50; a wrong name lists them."),
    click.option("--teacher", help="Trained weights: a .safetensors, .pth, .pt or .bin file, or its folder."),
    click.option(
        "--pretrained", is_flag=True, default=None, help="Begin with timm's own weights, from its hub."
    ),
    click.option("--teacher-cache", help="Folder that keeps the teacher's answers, for other budgets, too."),
    click.option(
        "--teacher-epochs", type=int, help="Epochs of the teacher, if weights or its classifier lack."
    ),
    click.option("--warmup-epochs", type=int, help="Epochs before the search."),
    click.option("--search-epochs", type=int, help="Epochs of the joint search."),
    click.option("--post-epochs", type=int, help="Epochs after the structure is fixed."),
    click.option("--lr", type=float, help="Peak learning rate of the teacher and of post-training."),
    click.option("--search-lr", type=float, help="Peak learning rate of warm-up and search."),
    click.option(
        "--freeze",
        multiple=True,
        callback=lambda _context, _option, values: values or None,
        metavar="PATTERN",
        help="Leave parameters or modules as they are, as in patch_embed, 'blocks.[0-3]'; may be repeated.",
    ),
    click.option(
        "--precision",
        metavar="auto|float32|bfloat16|float16",
        help="Of the products in training; float32. auto: what a step is faster in here.",
    ),
    click.option("--skip", metavar="none|blocks|halves", help="What may be skipped."),
    click.option(
        "--tokens-per-image", type=int, help="Patch tokens that costs count, where images may have any size."
    ),
    click.option("--tokens", type=int, help="Blocks at which patch tokens may be dropped, 0 to 3."),
    click.option("--distill", metavar="none|soft|hard", help="How the teacher teaches."),
    click.option("--distill-features", type=float, help="Weight of the distance of pooled features; 0."),
    click.option("--accumulate", type=int, help="Parts in which a batch goes through the model; 1."),
    click.option(
        "--grad-checkpointing",
        is_flag=True,
        default=None,
        help="Keep less for the backward pass, compute again.",
    ),
    click.option(
        "--compile",
        is_flag=False,
        flag_value="inductor",
        metavar="[BACKEND]",
        help="Run blocks in training as torch.compile makes them, by inductor if no backend is named.",
    ),
    click.option("--fsdp", is_flag=True, default=None, help="Spread weights and moments over the processes."),
    click.option("--checkpoint-every", type=int, help="Steps between checkpoints inside an epoch; 0: none."),
    click.option("--checkpoint-minutes", type=float, help="Minutes between checkpoints, as well; 0: none."),
    click.option("--skip-not-finite", type=int, help="Steps left out as their loss or gradient is NaN; 0."),
    click.option(
        "--tracker",
        multiple=True,
        callback=lambda _context, _option, values: values or None,
        metavar="wandb|mlflow",
        help="Also report there, as its own settings say; may be repeated.",
    ),
    click.option(
        "--resume",
        is_flag=False,
        flag_value="yes",
        callback=read_resume,
        metavar="[auto]",
        help="Continue the run in --out, with the options it began with; auto: or begin it.",
    ),
    click.option("--quiet", is_flag=True, help="Show no progress."),
)


def compress_options(command: Callable) -> Callable:
    """Gives a command these options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command

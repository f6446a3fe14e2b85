"""The command line: `uvc compress`, `eval`, `compact`, `export`, `report`, `bench` and `doctor`.

Options that are not given are None: their defaults stand in the recipe and in `uvc.config`, which also check
the values.
Bad input ends with exit code 2 and one line on stderr; an interrupt with 130 and one line.
"""

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from uvc.app.compress_options import compress_options
from uvc.app.options import (
    FOLDER,
    Renamed,
    data_options,
    join_numbers,
    json_option,
    read_multiples,
    read_target,
)
from uvc.settings import BadSetting, to_toml

# Accelerate's launcher takes its torchrun for GPUs alone, unless it is told to.
ONE_OF_NONE = (
    "uvc: accelerate has started one process; on a CPU it starts several by accelerate launch --multi_gpu "
    "--num_processes N -m uvc compress --device cpu, or use torchrun --nproc_per_node N"
)


class Interrupted(click.ClickException):
    """The user stopped a run; the message says how to continue it."""

    exit_code = 130


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="uvc-vit", message="uvc %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compress vision transformers under one budget: heads, dims, neurons, blocks, found while training."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _print(table: Any) -> None:
    """A table in the terminal's width; where there is none, as wide as it needs to be."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(table)


def _print_json(figures: Any) -> None:
    from uvc.io.files import to_json

    click.echo(to_json(figures))


@cli.command()
@compress_options
@json_option
def compress(config: Path | None, show_config: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Train a teacher (unless weights are given), search, harden to the budget, post-train, report."""
    from uvc.app.pipeline import compress_run
    from uvc.app.resolve import resolve
    from uvc.environment import launched_as, one_of_none
    from uvc.training.signals import Stopped, stop_on_signals

    run = resolve(options, config)
    if show_config:
        click.echo(to_toml(run), nl=False)
        return
    main = launched_as() == 0
    say = partial(click.echo, err=True) if main and not quiet else lambda line: None
    if one_of_none():
        click.echo(ONE_OF_NONE, err=True)
    try:
        with stop_on_signals():
            summary = compress_run(run, progress=not quiet, say=say)
    except Stopped as stopped:
        if main:
            click.echo(f"{stopped}; continue with: uvc compress --resume --out {run.out}", err=True)
        return
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted{_how_to_continue(run.out)}") from None
    except (OSError, RuntimeError) as error:
        said = _of_a_reader(error)
        if not said and not isinstance(error, OSError):
            raise
        raise click.UsageError(f"{said or error}{_how_to_continue(run.out)}") from None
    if main and as_json:
        _print_json({"folder": run.out, **summary})
    elif main:
        _print_report(Path(run.out), summary)


def _of_a_reader(error: Exception) -> str | None:
    """What to say of a process that reads images and has ended, as torch says wherever a command stands, or
    where the next batch is asked for; None: it is another error.
    """
    said = " ".join(str(error).split())
    ended = said.startswith("DataLoader worker (pid")
    return f"a process that reads images has ended ({said})" if ended else None


def _how_to_continue(out: str | None) -> str:
    begun = out is not None and (Path(out) / "run.json").is_file()
    return f"; continue with: uvc compress --resume --out {out}" if begun else ""


@cli.command("eval")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@data_options
@click.option("--budget", type=float, help="Of a model for several budgets, one; the largest.")
@json_option
def evaluate(folder: Path, as_json: bool, **options: Any) -> None:
    """Load the model in DIR and measure its top-1 accuracy; the data default to those of its run."""
    from uvc.app.evaluating import evaluate_run

    figures = evaluate_run(folder, **options)
    if as_json:
        return _print_json({"folder": str(folder), **figures})
    click.echo(f"top-1 {figures['top1']:.2f} %  of {figures['images']} images of {figures['data']}")
    click.echo(f"MACs {figures['macs']:,}  parameters {figures['params']:,}")


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Files read at a time; as many as processors.")
def data(folder: Path, workers: int | None) -> int:
    """Read every file of an image folder and say what is wrong with it; exit with 1 when something is."""
    from uvc.app.data_check import check_folder, data_table

    checked = check_folder(folder, workers)
    if checked.splits:
        _print(data_table(checked))
    for line in checked.notes:
        click.echo(f"note: {line}")
    for line in checked.problems:
        click.echo(f"problem: {line}")
    return 1 if checked.problems else 0


@cli.command()
@click.argument(
    "folders",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--html", type=FOLDER, metavar="FILE", help="One page of all runs, which needs no network.")
@json_option
def report(folders: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Show the results of the runs in DIR... and draw their structures again."""
    from uvc.app.run_dir import read_summary
    from uvc.app.summary import draw_run

    runs = []
    for folder in folders:
        summary = read_summary(folder)
        draw_run(folder, summary)
        runs.append({"folder": str(folder), **summary})
        if not as_json:
            _print_report(folder, summary)
    if html is not None:
        from uvc.app.page import write_page

        write_page(folders, html)
    if as_json:
        _print_json({"runs": runs, "html": None if html is None else str(html)})
    elif html is not None:
        click.echo(f"the page:      {html}")


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--format", "format_", required=True, help="safetensors, onnx, torch-export or aoti.")
@click.option(
    "--to", type=FOLDER, help="The file to write, for safetensors the folder; default: in DIR/export."
)
@click.option("--int8", is_flag=True, help="Products with weights in 8 bits, for onnx; ranges from images.")
@click.option("--dtype", metavar="float32|float16|bfloat16", help="Of weights and images; the model's own.")
@click.option("--check", metavar="openvino", help="A second runtime that must agree, for onnx.")
@click.option("--data", help="Whose images give int8 its ranges; those of the run.")
@click.option("--data-root", help="Where a data set that timm names is stored.")
@click.option("--time", is_flag=True, help="Time it beside the dense model in the same runtime.")
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Images per timed pass; 1.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@json_option
def export(folder: Path, format_: str, as_json: bool, **options: Any) -> None:
    """Write the model in DIR for other programs, read it back, and compare."""
    from uvc.app.exporting import export_run, lines

    figures = export_run(folder, format_, **options)
    if as_json:
        return _print_json(figures)
    for line in lines(figures):
        click.echo(line)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--for",
    "target",
    callback=read_target,
    metavar="cpu,batch=1,threads=1",
    help="Where the model will run: device, images per forward pass, CPU threads.",
)
@click.option("--out", type=FOLDER, help="Folder of the model; default: DIR itself.")
@json_option
def compact(folder: Path, target: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Measure here which form of each layer's heads is faster, and write the model in these forms."""
    from uvc.app.compacting import choice_table, compact_run
    from uvc.app.run_dir import COMPACT, read_json

    choice = compact_run(folder, out, **target)
    if as_json:
        return _print_json({"folder": str(out or folder), **read_json((out or folder) / COMPACT)})
    _print(choice_table(choice))
    click.echo(f"the model: {(out or folder) / 'model.safetensors'}")


@cli.command()
@click.argument("to", metavar="FILE", type=FOLDER)
@click.option("--model", required=True, help="A timm model that uvc.convert serves.")
@click.option("--device", help="cpu or cuda, perhaps with a number: cuda:1.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads for torch.")
@click.option("--batch-size", type=click.IntRange(1), help="Images per forward pass; 1.")
@click.option(
    "--round-to",
    "--grain",
    "round_to",
    cls=Renamed,
    callback=read_multiples,
    help="Measure multiples of these dims and neurons, as in 16,64.",
)
def latency(to: Path, **options: Any) -> None:
    """Measure what the parts of a model take on this device, for compress --latency-table FILE, anywhere."""
    from uvc.app.measuring import measure_run

    table = measure_run(to, **options)
    dense = table.fixed + table.blocks * (table.attn[-1][-1] + table.mlp[-1])
    click.echo(f"{to}: {dense:.2f} ms on {table.device}; smallest budget {table.fixed / dense:.3f}")


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what was built, what this machine can run, and what passed its self-check."""
    from uvc.app.doctor import diagnosis, examine

    if as_json:
        _print_json(examine())
    else:
        _print(diagnosis())


@cli.command()
@click.option("--model", help="A timm model that uvc.convert serves.")
@click.option("--device", help="cpu or cuda, perhaps with a number: cuda:1.")
@click.option("--keep", help="Kept fractions to measure, as in 0.75,0.5,0.25.")
@click.option("--batch-size", type=click.IntRange(1), help="Images per step.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the products.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads for torch.")
@click.option("--rounds", type=click.IntRange(3), help="Samples of each variant.")
@click.option("--out", type=FOLDER, help="Where table and picture go.")
@click.option("--against", type=FOLDER, help="Fail when slower than the rows of this CSV.")
@click.option("--against-ref", help="Fail when slower than this git commit, measured side by side.")
def bench(**options: Any) -> int:
    """Say what skipping buys on this machine; exit with 1 when it is slower than it was."""
    from uvc.bench.quick import bench

    return bench(options, click.echo)


def _print_report(out: Path, summary: dict[str, Any]) -> None:
    from uvc.app.summary import result_table

    _print(result_table(summary))
    # Plain prints: a path that rich wraps can no longer be copied.
    click.echo(f"what was kept: {out / 'structure.png'}")
    click.echo(f"the model:     {out / 'model.safetensors'}, by uvc.load({str(out)!r})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and exit with 0, 2 (bad input) or 130 (interrupted)."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors that a user can cause become one line on stderr, and so
    do warnings. Of several processes one speaks.
    """
    from uvc.environment import launched_as

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding does not have
    if launched_as() > 0:
        warnings.simplefilter("ignore")
    warnings.formatwarning = lambda message, *_, **__: f"uvc: {' '.join(str(message).split())}\n"
    try:
        arguments = join_numbers(sys.argv[1:] if arguments is None else arguments)
        status = cli.main(args=arguments, prog_name="uvc", standalone_mode=False)
    except click.ClickException as error:
        return _fail(error.format_message(), 2 if error.exit_code == 1 else error.exit_code)
    except BadSetting as error:
        return _fail(f"--{error.field.replace('_', '-')}: {error.reason}", 2)
    except click.Abort:
        return _fail("interrupted", 130)
    except (ValueError, RuntimeError, OSError) as error:
        said = _of_a_reader(error)
        if not said and _is_bug(error):
            raise
        return _fail(said or str(error), 2)
    return status if isinstance(status, int) else 0


def _is_bug(error: BaseException) -> bool:
    """Whether an error was raised outside this package, so that its traceback is what helps."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return not isinstance(error, OSError) and module.partition(".")[0] not in ("uvc", "uvc_kernels")


def _fail(message: str, code: int) -> int:
    from uvc.training.processes import speaks

    if speaks():
        click.echo(f"uvc: {' '.join(message.split())}", err=True)
    return code

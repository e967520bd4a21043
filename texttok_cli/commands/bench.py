"""`texttok bench`: how fast it is, what quality that speed buys, and reports of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from texttok_cli.commands.options import DebugOption, DeviceOption, JsonOption, OfflineOption, OutOption, QuietOption, given_options
from texttok_cli.config import Precision
from texttok_cli.errors import UsageError

if TYPE_CHECKING:
    from texttok_cli.bench.latency import Part
    from texttok_cli.bench.report import Table
    from texttok_cli.bench.results import LatencyResult
    from texttok_cli.bench.task import Task

bench = typer.Typer(help="Measure speed, measure speed against quality, and report the results.", no_args_is_help=True)
PART_NAMES = ("text", "encode", "decode", "generate", "load", "train", "eval", "caption")
SIZES = (256, 512)
UNUSED_BY_TARGETS = ("part", "tokens", "image_size", "generator", "steps", "cfg")


@bench.command()
def latency(
    context: typer.Context,
    part: Annotated[list[str] | None, typer.Option(help=f"What to time, repeatable: {', '.join(PART_NAMES)}; default all.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "32,64,128,256",
    image_size: Annotated[str, typer.Option(help="256, 512, or both separated by a comma.")] = "256",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,32",
    generator: Annotated[Literal["L", "XL"], typer.Option(help="Size of the DiT.")] = "L",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 250,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim, dpm++2m.")] = "ddpm",
    cfg: Annotated[str, typer.Option(help="Guidance, as in `texttok sample --cfg`; 1 means none.")] = "1.5",
    precision: Annotated[Precision, typer.Option(help="Precision of the models.")] = "bf16",
    warm_up: Annotated[int, typer.Option(min=0, help="Warm-up runs, not counted.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median is reported.")] = 5,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time of one thread, for a machine in use.")] = "wall",
    targets: Annotated[
        bool,
        typer.Option("--targets", help="Instead, report how close the program comes to the hardware limit, as ratios against targets."),
    ] = False,
    out: OutOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time every part of the pipeline with models of the paper's sizes and random weights.

    Each row is a median with its quartiles. Only part of the denoising steps, and on a CPU only part of a large batch, is run, and
    the time is multiplied; what does not fit into memory is not tried. The rows affected are marked. -o writes everything as JSON,
    with the machine and the versions.
    """
    import torch

    from texttok_cli.bench.latency import check
    from texttok_cli.bench.machine import describe
    from texttok_cli.bench.networks import Where
    from texttok_cli.bench.report import latency_table, target_table
    from texttok_cli.bench.results import LatencyResult
    from texttok_cli.bench.task import Task
    from texttok_cli.bench.timing import Timer
    from texttok_cli.diffusion import Sampling, parse_cfg
    from texttok_cli.models.devices import pick_device

    if targets:
        _refuse_unused(context)
    parts = _parts(part)
    where = Where(pick_device(device), precision)
    task = Task(
        where,
        Timer(where.device, warm_up=warm_up, repeats=repeats, clock=clock),
        _numbers("--image-size", image_size, SIZES),
        _numbers("--tokens", tokens),
        _numbers("--batch", batch),
        generator,
        Sampling(sampler, steps, parse_cfg(cfg)),
    )
    check(task, ["generate"] if targets else parts)
    machine = describe(where.device, clock=clock)
    result = LatencyResult(weights="random weights", precision=precision, machine=machine)
    try:
        devices = [where.device] if where.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # by default it takes all GPUs, and warns of that
            torch.manual_seed(0)
            _collect(result, task, parts, targets=targets, out=out, quiet=quiet)
    finally:  # what was measured before a failure or Ctrl-C is shown too
        if json and (result.rows or result.targets):
            print(result.model_dump_json())
        elif result.rows or result.targets:
            _print(target_table("Targets", result) if targets else latency_table("Latency", result))


@bench.command()
def tradeoff(
    spec: Annotated[Path, typer.Argument(help="A YAML file: series of generators with their steps, samplers and guidance.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the points, the result and the plots.")],
    ref: Annotated[str | None, typer.Option(metavar="DIR|NPZ|TAR", help="References of the FID, instead of the spec's.")] = None,
    paper_size: Annotated[Literal["256", "512"], typer.Option(help="Which of the paper's curves is drawn beside ours.")] = "256",
    precision: Annotated[Precision, typer.Option(help="Precision of the models.")] = "bf16",
    device: DeviceOption = "auto",
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sweep settings of generators: seconds per image against FID, and what follows from them (Fig. 4 of the paper).

    Every point is saved as soon as it is measured; rerun the same command to continue. DIR gets NAME.json, NAME.png and NAME.svg.
    """
    from texttok_cli.bench.plots import plot_tradeoff
    from texttok_cli.bench.report import tradeoff_tables
    from texttok_cli.bench.results import save_result
    from texttok_cli.bench.sweep import sweep
    from texttok_cli.bench.tradeoff import load_spec
    from texttok_cli.console import progress, say
    from texttok_cli.models.devices import pick_device

    chosen = load_spec(spec)
    references = ref or chosen.ref
    if references is None:
        raise UsageError(f"{spec}: names no references for the FID: add ref, or give --ref")
    with progress(quiet=quiet) as bar:
        bars = bar.add_task("points", total=None, note="")
        result = sweep(
            chosen,
            references,
            out,
            device=pick_device(device),
            precision=precision,
            offline=offline,
            paper_size=256 if paper_size == "256" else 512,
            on_point=lambda done, total, note: bar.update(bars, completed=done, total=total, note=note),
        )
    save_result(out / f"{chosen.name}.json", result)
    files = plot_tradeoff(result, out / chosen.name)
    if json:
        print(result.model_dump_json())
        return
    for table in tradeoff_tables(result):
        _print(table)
    if not quiet:
        say(f"plots: {', '.join(map(str, files))}")


@bench.command()
def report(
    inputs: Annotated[list[Path], typer.Argument(help="Result files of `bench` and of `eval -o`, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for report.md, report.html and the plots.")],
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Merge results into one page of tables and plots, as Markdown and as one self-contained HTML file."""
    from texttok_cli.bench.report import find_results, write_report
    from texttok_cli.console import emit, say

    found = find_results(inputs)
    for reason in found.damaged:
        say(f"left out: {reason}")
    files = write_report(found, out)
    if found.unknown and not quiet:
        say(f"left out, of another kind: {', '.join(path.name for path in found.unknown)}")
    emit({"results": len(found), "files": [str(file) for file in files]}, as_json=json)
    if found.damaged:
        raise typer.Exit(1)


# ------------------------------------------------------------------ the latency command's parts


def _parts(chosen: list[str] | None) -> list[Part]:
    for name in chosen or []:
        if name not in PART_NAMES:
            raise UsageError(f"--part {name}: there are {', '.join(PART_NAMES)}")
    return list(dict.fromkeys(chosen or PART_NAMES))  # type: ignore[arg-type]


def _numbers(option: str, text: str, allowed: tuple[int, ...] = ()) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: not whole numbers separated by commas") from None
    wrong = [value for value in values if value < 1 or (allowed and value not in allowed)]
    if wrong:
        raise UsageError(f"{option} {wrong[0]}: must be {' or '.join(map(str, allowed)) if allowed else 'at least 1'}")
    return list(dict.fromkeys(values))


def _collect(result: LatencyResult, task: Task, parts: list[Part], *, targets: bool, out: Path | None, quiet: bool) -> None:
    """All rows or all targets into the result; the file is written after each, as a run takes long."""
    from texttok_cli.bench.latency import latency as rows_of
    from texttok_cli.bench.results import save_result
    from texttok_cli.bench.targets import targets as targets_of
    from texttok_cli.console import progress

    with progress(quiet=quiet) as bar:
        counter = bar.add_task("targets" if targets else "rows", total=None, note="")
        for item in targets_of(task) if targets else rows_of(task, parts):
            (result.targets if targets else result.rows).append(item)  # type: ignore[arg-type]
            if out is not None:
                save_result(out, result)
            bar.update(counter, advance=1, note=getattr(item, "name", "") or f"{getattr(item, 'part', '')} {getattr(item, 'system', '')}")


def _refuse_unused(context: typer.Context) -> None:
    """UsageError for options that --targets does not read: what it measures is fixed."""
    given = [option for name, option in given_options(context).items() if name in UNUSED_BY_TARGETS]
    if given:
        raise UsageError(f"--targets measures fixed systems: leave out {', '.join(given)}")


def _print(table: Table) -> None:
    from texttok_cli.console import one_line, print_columns, stdout

    stdout.print(one_line(table.title), style="bold", markup=False)
    if table.remark:
        stdout.print(one_line(table.remark), markup=False)
    print_columns([table.columns, *table.rows])

"""`texttok sample`: images of classes or prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from texttok_cli.commands.options import BatchSizeOption, DebugOption, DeviceOption, JsonOption, OfflineOption, PrecisionOption, QuietOption
from texttok_cli.config import Labels
from texttok_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from texttok_cli.commands.sample_folder import SampleFolder
    from texttok_cli.diffusion import Sampling
    from texttok_cli.generation import Generator, Request

GRID_COLUMNS = 8  # at most twice as many, if each class or prompt has a row of its own


def sample(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The folder for images, grid.png and samples.jsonl.  [required]")
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="ID|NAME", help="A class: 120, flower/sunflower, tulip; repeatable.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What the images show, for a text-to-image model; repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one per line; for a .jsonl file, the `caption` of each line.")
    ] = None,
    labels: Annotated[
        Labels | None,
        typer.Option(help="Sample all classes: equally many, in proportion to training images, or drawn by the seeds. -n is the total."),
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Images of each class or prompt; with --labels of all classes together.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Sampling steps, else the model's own (the bundled ones' 25).")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddpm, ddim or dpm++2m; for a flow model heun or euler; else the model's own (the bundled ones' euler)."),
    ] = None,
    cfg: Annotated[
        str | None,
        typer.Option(
            metavar="CFG",
            help="Guidance: 1.5, 3.8:power-cosine=4, 1.8:interval=0,0.7 (of t/T), 1.5:channels=3 (the first), 1: none; else the model's own"
            " (the bundled ones' 2).",
        ),
    ] = None,
    guide: Annotated[
        str | None, typer.Option(metavar="G", help="A weaker generator for autoguidance, instead of the null condition.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Image i has the seed SEED + i: to continue a run of N images with new ones, use SEED + N.")
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="G", help="A generator: a bundled name, a file, hf://owner/name; else the bundled one."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="M", help="The generator's tokenizer, if it is neither bundled nor beside the generator.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Unseen captions by class for the detokenizer, else those beside the generator.")
    ] = None,
    list_classes: Annotated[
        bool, typer.Option("--list-classes", help="Print the names of the model's classes by id, and make nothing.")
    ] = False,
    format_: Annotated[Literal["png", "npz"], typer.Option("--format", help="PNG files, or ADM's samples.npz.")] = "png",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    batch_size: BatchSizeOption = 32,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make images of classes or prompts.

    The model's file says how it is sampled, where --steps, --sampler and --cfg don't.
    Every image depends on its seed and on what is asked for, not on the batch size. Rerun the same command after an
    interruption: existing images are kept. Under `torchrun -m texttok_cli sample ...` the processes share the work.

    With a class model whose tokenizer reads text, the tokens are made from the class alone, and the detokenizer gets a caption
    of that class that no training image has, drawn by the image's seed.
    """
    from texttok_cli.commands.sample_folder import SampleFolder
    from texttok_cli.console import emit, progress, say
    from texttok_cli.generation import bundled_generator, load_generator
    from texttok_cli.inference import find_model
    from texttok_cli.metrics.processes import Processes

    if list_classes:
        _list_classes(model or bundled_generator("class"), offline=offline, as_json=json)
        return
    if out is None:
        raise typer.BadParameter("name the folder for the images", param_hint="'--out' / '-o'")
    texts = _prompts(prompt, prompts)
    _check_one_kind({"--class": classes, "--prompt(s)": texts, "--labels": labels})
    processes = Processes()
    file = find_model(model or bundled_generator("class" if texts is None else "text"), offline=offline)
    how = _how(file, sampler, steps, cfg, guide)
    generator = load_generator(
        file, tokenizer=tokenizer, captions=captions, guide=guide, device=processes.device(device), precision=precision, offline=offline
    )
    requests = _requests(generator, classes, texts, labels, number, seed)
    made_by = _made_by(generator, how, labels)
    settings = {"format": format_, "images": len(requests), "seed": seed, "precision": precision, **made_by}
    where = generator.tokenizer.device.type  # the noise is drawn there, and other devices draw another
    folder = SampleFolder(out, len(requests), {**settings, "device": where, "classes_or_prompts": _digest(requests)})
    already = len(requests) - len(folder.missing())
    first = processes.rank == 0
    try:
        with progress(quiet=quiet or not first) as bar:
            share = [i for i in folder.missing() if i % processes.size == processes.rank]
            task = bar.add_task("sampling", total=len(share), note="")
            for start in range(0, len(share), batch_size):
                chosen = share[start : start + batch_size]
                folder.add(chosen, generator.generate([requests[i] for i in chosen], how))
                bar.advance(task, len(chosen))
        processes.join()
        processes.finish()  # every one has made its share
    finally:
        if first and folder.begun:
            folder.record(lambda i: {**_about(generator, requests[i]), **made_by})
    if first:
        labelled = [request.class_id for request in requests if request.class_id is not None]
        folder.finish(labels=labelled or None, columns=_columns(len(requests), number))
        if generator.truncated and not quiet:
            say(f"longer than the text encoder takes, so the end was cut off: {generator.truncated:,} texts")
        emit(_summary(generator, requests, folder, already), as_json=json)


def _list_classes(model: str, *, offline: bool, as_json: bool) -> None:
    from texttok_cli.checkpoint import read_generator_header
    from texttok_cli.console import emit, one_line
    from texttok_cli.inference import find_model

    classes = read_generator_header(find_model(model, offline=offline)).classes
    if classes is None:
        raise DataError(f"{model}: names no classes: it takes prompts, or ids alone")
    if as_json:
        emit({"classes": classes}, as_json=True)
    else:
        print("\n".join(map(one_line, classes)))


def _how(file: Path, sampler: str | None, steps: int | None, cfg: str | None, guide: str | None) -> Sampling:
    """How to sample the generator of this file: checked by its header, as loading it with its tokenizer takes a while."""
    from texttok_cli.checkpoint import read_generator_header
    from texttok_cli.diffusion import Sampling, plan_sampling

    config = read_generator_header(file).model
    how = Sampling.asked(config, sampler, steps, cfg)
    plan_sampling(config, how, by_null=guide is None)
    if guide is not None and how.guidance.scale == 1:
        raise UsageError(f"--guide {guide}: would not be used, as cfg 1 means no guidance: give another --cfg, or leave out --guide")
    return how


def _check_one_kind(options: Mapping[str, object | None]) -> None:
    given = [name for name, value in options.items() if value]
    if len(given) != 1:
        problem = f"{' and '.join(given)} exclude each other" if given else "nothing to sample"
        raise UsageError(f"{problem}: give --class, --prompt or --prompts, or --labels for all classes")


def _prompts(prompt: list[str] | None, file: Path | None) -> list[str] | None:
    """Of --prompt, then of the file of --prompts; None for neither."""
    if file is None:
        return prompt
    from texttok_cli.data.texts import read_prompts

    return [*(prompt or []), *read_prompts(file)]


def _requests(
    generator: Generator, classes: list[str] | None, prompts: list[str] | None, labels: Labels | None, number: int, seed: int
) -> list[Request]:
    """All images of the run in their order."""
    if labels is not None:
        seeds = range(seed, seed + number)
        return generator.requests(classes=generator.labels(labels, seeds), seeds=seeds)
    conditions = [condition for condition in classes or prompts or [] for _ in range(number)]
    seeds = range(seed, seed + len(conditions))
    if classes:
        return generator.requests(classes=conditions, seeds=seeds)
    return generator.requests(prompts=conditions, seeds=seeds)


def _made_by(generator: Generator, how: Sampling, labels: Labels | None) -> dict[str, Any]:
    """What all images have in common."""
    return {
        "sampler": how.sampler,
        "steps": how.steps,
        "cfg": str(how.guidance),
        "labels": labels,
        "generator": generator.info.name,
        "generator_sha256": generator.info.sha256,
        "tokenizer": generator.tokenizer.info.name,
        "tokenizer_sha256": generator.tokenizer.info.sha256,
        "captions_sha256": None if generator.captions is None else generator.captions.sha256,
        "guide_sha256": None if generator.guide_info is None else generator.guide_info.sha256,
    }


def _about(generator: Generator, request: Request) -> dict[str, Any]:
    """What is one image's own; its caption, if any, is the prompt or what the detokenizer read."""
    about: dict[str, Any] = {"seed": request.seed}
    if request.class_id is not None:
        about |= {"class": generator.class_name(request.class_id), "class_id": request.class_id}
    if request.text is not None:
        about["caption"] = request.text
    if request.leaked:
        about["leaked"] = True
    return about


def _summary(generator: Generator, requests: Sequence[Request], folder: SampleFolder, already: int) -> dict[str, object]:
    """What the command reports; captions that were trained on are told in any case."""
    from texttok_cli.console import say

    summary: dict[str, object] = {"images": len(requests), "out": str(folder.path), "model": generator.info.name, "grid": str(folder.grid)}
    if already:
        summary["already_there"] = already
    leaked = sum(request.leaked for request in requests)
    if leaked:
        summary["with_leaked_captions"] = leaked
        say(f"captions that are in the generator's training data: {leaked:,} of the {len(requests):,} images are decoded with one")
    return summary


def _columns(images: int, number: int) -> int:
    """Of the grid: a row for each class or prompt if there are several with some images, of one alone as square as can be."""
    if images == number:
        return min(GRID_COLUMNS, math.ceil(math.sqrt(images)))
    return number if 1 < number <= 2 * GRID_COLUMNS else GRID_COLUMNS


def _digest(requests: Sequence[Request]) -> str:
    """Hex digest of the seeds, classes and texts."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request!r}\n".encode())
    return digest.hexdigest()

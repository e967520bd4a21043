"""`texttok caption`: captions of images, and unseen captions of classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from texttok_cli.captioners.load import CaptionerName
from texttok_cli.commands.caption_backends import Settings, WriterName
from texttok_cli.commands.options import DebugOption, DeviceOption, JsonOption, OfflineOption, PrecisionOption, QuietOption, given_options
from texttok_cli.errors import UsageError

if TYPE_CHECKING:
    from texttok_cli.data import Dataset

OUT, UNSEEN_OUT = Path("captions.jsonl"), Path("unseen.captions.jsonl")


def caption(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT...", help="Images, folders, manifests (.jsonl, .csv), shards (.tar), - for a list on stdin."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Default captions.jsonl, or unseen.captions.jsonl with --unseen-per-class; written line by line.",
        ),
    ] = None,
    captioner: Annotated[
        CaptionerName,
        typer.Option(
            help="classifier: ImageNet labels plus measured colours and light. class-text: the class name. class-measured: class name plus"
            " colours and light. sidecar: the text beside an image. vlm, coca, endpoint: a captioning model."
        ),
    ] = "classifier",
    model: Annotated[str | None, typer.Option("--model", "-m", help="vlm, lm: hub name or folder. endpoint, coca: model name.")] = None,
    weights: Annotated[str | None, typer.Option(help="coca: a file, or a tag of open_clip.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible, such as http://localhost:8000/v1; its key is read from TEXTTOK_API_KEY."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the endpoint at the same time.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer of the endpoint.")] = 60,
    retries: Annotated[int, typer.Option(min=0, help="Times a request to the endpoint is repeated.")] = 5,
    template: Annotated[str | None, typer.Option(help="class-text, class-measured: text with {} for the class.")] = None,
    max_words: Annotated[int, typer.Option(min=1, help="Longest caption (the paper: 75, and 25).")] = 75,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="vlm, endpoint, lm: limit of tokens per caption, reasoning included; default 4 per word.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help="vlm: how accelerate spreads it over devices, such as auto.")] = None,
    unseen_per_class: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Instead of captioning the images, write K captions per class that none of them has."),
    ] = None,
    writer: Annotated[
        WriterName, typer.Option(help="Unseen captions: attributes combines measured words; lm and endpoint ask a language model.")
    ] = "attributes",
    captions: Annotated[Path | None, typer.Option(help="Unseen captions: a captions.jsonl of the training images.")] = None,
    caption_field: Annotated[
        str | None, typer.Option(help="Which key of a shard's .json is the text beside an image: measured, longest, ...")
    ] = None,
    avoid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT", help="Unseen captions: evaluation images or their captions.jsonl, whose captions are left out; repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Unseen captions: random seed.")] = 0,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="Print the prompt, its version and hash, and stop.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per batch of a local captioner.")] = 16,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write captions of images, for `encode --captions` and `train ... data.captions=`.

    OUT has a line for each image: id (of a shard the key), caption, class, backend, model, prompt hash, words, hash of the file.
    Run the same command again after an interruption, or to try again what failed: images that are in OUT are skipped.

    With --unseen-per-class K the inputs are training images with captions and classes, and OUT is the list that `texttok
    sample` draws from for a class model: captions that no training image has, and none of the images given with --avoid.
    """
    settings = Settings(
        captioner=captioner,
        writer=writer,
        model=model,
        weights=weights,
        endpoint=endpoint,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        template=template,
        max_words=max_words,
        max_tokens=max_tokens,
        device=device,
        device_map=device_map,
        precision=precision,
        offline=offline,
    )
    if show_prompt:
        _show_prompt(settings, unseen=unseen_per_class is not None, json=json)
        return
    from texttok_cli.captioners.store import drop_cut_line
    from texttok_cli.console import say
    from texttok_cli.data import open_dataset

    if not inputs:
        raise UsageError("no images: name files, folders, manifests or shards")
    settings.check(given_options(context).values(), unseen=unseen_per_class is not None)
    out = out or (OUT if unseen_per_class is None else UNSEEN_OUT)
    if drop_cut_line(out) and not quiet:  # before the inputs are read: OUT may be the captions.jsonl of a folder among them
        say(f"{out}: its last line had been cut off and was dropped; it is written again")
    if unseen_per_class is not None:
        from texttok_cli.commands.caption_unseen import evaluation_captions, write_unseen

        training = open_dataset(inputs, captions=captions, caption_field=caption_field)
        evaluation = [text for name in avoid or [] for text in evaluation_captions(name, caption_field)]
        done = write_unseen(settings, training, evaluation, unseen_per_class, out, seed=seed, quiet=quiet, json=json)
    else:
        dataset = open_dataset(inputs, caption_field=caption_field)
        done = _caption_images(settings, dataset, out, batch_size=batch_size, quiet=quiet, json=json)
    if not done:
        raise typer.Exit(1)


def _show_prompt(settings: Settings, *, unseen: bool, json: bool) -> None:
    from texttok_cli.captioners.prompts import load_prompt
    from texttok_cli.console import emit

    prompt = load_prompt("unseen" if unseen else "caption", max_words=settings.max_words)
    emit({"name": prompt.name, "version": prompt.version, "sha256": prompt.sha256, "text": prompt.text}, as_json=json)


def _caption_images(settings: Settings, dataset: Dataset, out: Path, *, batch_size: int, quiet: bool, json: bool) -> bool:
    """Whether every image has a caption."""
    from texttok_cli.captioners.run import write_captions
    from texttok_cli.console import emit, progress, say

    captioner = settings.load_captioner()
    failed = [(entry.id, entry.reason) for entry in dataset.skipped]
    with progress(quiet=quiet) as bar:
        task = bar.add_task("captioning", total=len(dataset), note="")
        done = write_captions(
            captioner,
            dataset,
            out,
            max_words=settings.max_words,
            batch_size=batch_size,
            on_error=lambda image_id, reason: failed.append((image_id, reason)),
            on_progress=lambda done, total: bar.update(task, completed=done),
        )
    for image_id, reason in failed:
        say(f"failed {image_id}: {reason}")
    if done.cut and not quiet:
        say(f"longer than {settings.max_words} words or than the model could write, so the end was cut off: {done.cut:,} captions")
    summary = {"out": str(out), "captioner": captioner.backend, "model": captioner.model or "none", "captions": done.written}
    more = {"already_there": done.already_there, "cut": done.cut, "failed": len(failed)}
    emit(summary | {name: value for name, value in more.items() if value}, as_json=json)
    return not failed

"""`texttok encode`: images and their captions to token files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from texttok_cli.commands.options import (
    BatchSizeOption,
    CaptionFieldOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    QuietOption,
)
from texttok_cli.config import DEFAULT_MODEL, LatentDtype
from texttok_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from texttok_cli.commands.encode_jobs import Files, Folder
    from texttok_cli.data import Dataset
    from texttok_cli.inference import Tokenizer


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Images, folders, manifests (.jsonl, .csv), shards (.tar), - for a list on stdin."),
    ],
    caption: Annotated[str | None, typer.Option(help="The caption, if the input is one image.")] = None,
    captions: Annotated[Path | None, typer.Option(help="A captions.jsonl.")] = None,
    caption_field: CaptionFieldOption = None,
    no_caption: Annotated[bool, typer.Option("--no-caption", help="Use the empty condition, and record it.")] = False,
    out: OutOption = None,
    flips: Annotated[bool, typer.Option("--flips", help="Also the tokens of every mirrored image, into the same folder.")] = False,
    dtype: Annotated[
        LatentDtype | None, typer.Option(help="How latents are stored: default fp16. Codes of a VQ model are integers.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="M", help="A bundled name, a model file, or hf://owner/name.")
    ] = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    batch_size: BatchSizeOption = 32,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn images into tokens.

    An image file gives IMAGE.tok.safetensors beside it, or in the folder or as the file OUT. A folder, manifest, shard
    or list gives shards of tokens and an index.json in the folder OUT. Tokens that are there already, made from the same
    image and caption by the same model, are skipped: rerun the command after an interruption. The batch size changes no
    latent by more than 1e-4 (fp32).
    """
    from texttok_cli.commands.encode_jobs import Files, Folder
    from texttok_cli.console import emit, progress, say
    from texttok_cli.data import open_dataset
    from texttok_cli.inference import encode_dataset, load_tokenizer

    _check_one_source(caption, captions, no_caption)
    dataset = open_dataset(inputs, captions=captions, caption_field=caption_field)
    if caption is not None and len(dataset) != 1:
        raise UsageError(f"--caption is for one image, these inputs hold {len(dataset):,}; give --captions FILE.jsonl")
    target = _target(inputs, dataset, out)
    tokenizer = load_tokenizer(model, device=device, precision=precision, offline=offline)
    if tokenizer.text_condition is None and (caption is not None or captions is not None):
        raise UsageError(f"{tokenizer.info.name}: takes no captions; leave out --caption(s), or use a model with text")
    texts = _texts(tokenizer, dataset, caption=caption, caption_field=caption_field, no_caption=no_caption)
    stored = tokenizer.token_dtype(dtype)
    if flips and not isinstance(target, Path):
        raise UsageError("--flips is for a data set whose tokens go into a folder, not for image files")
    job = Folder(target, tokenizer, stored, flips, dataset) if isinstance(target, Path) else Files(target, tokenizer, stored)
    failed = [(entry.id, entry.reason) for entry in dataset.skipped]
    with job, progress(quiet=quiet) as bar:
        task = bar.add_task("encoding", total=len(dataset), note="")

        def on_error(image_id: str, reason: str) -> None:
            failed.append((image_id, reason))
            bar.advance(task)

        def wanted(index: int, sha256: str) -> bool:
            there = job.has(index, sha256, None if texts is None else texts[index])
            if there:
                bar.advance(task)
            return not there

        parts = encode_dataset(tokenizer, dataset, texts, dtype=dtype, flips=flips, batch_size=batch_size, on_error=on_error, wanted=wanted)
        for indices, tokens in parts:
            job.add(indices, tokens)
            bar.advance(task, tokens.header.flipped.count(False))
    for image_id, reason in failed:
        say(f"skipped {image_id}: {reason}")
    if not quiet:
        _say_what_to_know(job, tokenizer)
    emit(_summary(job, tokenizer, len(dataset) - len(failed) + len(dataset.skipped), len(failed)), as_json=json)
    if failed:
        raise typer.Exit(1)


def _check_one_source(caption: str | None, captions: Path | None, no_caption: bool) -> None:
    given = {"--caption": caption is not None, "--captions": captions is not None, "--no-caption": no_caption}
    if sum(given.values()) > 1:
        raise UsageError(f"{' and '.join(name for name, there in given.items() if there)} exclude each other")


def _target(inputs: Sequence[str], dataset: Dataset, out: Path | None) -> Path | list[Path]:
    """A folder of shards, or for image files one token file each."""
    from texttok_cli.files import check_can_be_folder, check_distinct
    from texttok_cli.tokens import SUFFIX

    if out is not None and out.suffix != ".safetensors":
        check_can_be_folder(out, else_name=", or for one image a .safetensors file")
    named = {Path(name) for name in inputs}
    images_only = all(item.path in named and not item.in_shard for item in dataset.items)
    if not images_only or "-" in inputs:
        if out is None:
            raise UsageError("these inputs hold a data set: name the folder for its tokens with -o OUT")
        if out.suffix == ".safetensors":
            raise UsageError(f"{out}: the tokens of a data set go into a folder, this is a file's name")
        return out
    if out is not None and out.suffix == ".safetensors":
        if len(dataset) > 1:
            raise UsageError(f"{out}: is one file, and there are {len(dataset)} images; name a folder")
        return [out]
    files = [(out or item.path.parent) / f"{item.path.stem}{SUFFIX}" for item in dataset.items]
    twice, times = Counter(files).most_common(1)[0]
    if times > 1:
        raise DataError(f"{twice}: would be written for two of the images; encode them into different folders with -o")
    check_distinct(files)
    return files


def _texts(tokenizer: Tokenizer, dataset: Dataset, *, caption: str | None, caption_field: str | None, no_caption: bool) -> list[str] | None:
    """One text an image, or None for a model without text."""
    from texttok_cli.data.texts import texts_for

    if tokenizer.text_condition is None:
        return None
    if no_caption:
        return [""] * len(dataset)
    if caption is not None:
        return [caption]
    return texts_for(dataset.items, tokenizer.text_condition, caption_field=caption_field)


def _say_what_to_know(job: Files | Folder, tokenizer: Tokenizer) -> None:
    from texttok_cli.console import say

    if job.cropped:
        say(f"not square, so the centre was taken: {job.cropped:,} of {job.encoded:,} images")
    if tokenizer.text is not None and tokenizer.text.truncated:
        say(f"longer than {tokenizer.text.max_tokens} text tokens, so the end was cut off: {tokenizer.text.truncated:,} captions")
    job.say_replaced()
    if job.others:
        say(
            f"also in {job.out}: the tokens of {len(job.others):,} image(s) that are not among these inputs, such as {min(job.others)};"
            " they stay, and training on this folder uses them too. If you don't want them, encode into a new folder"
        )
    if job.same:
        say(
            f"of these, {len(job.same):,} are the same pictures as inputs under other ids, such as {min(job.same)}: two inputs that share"
            " an id get their names before it. Name the inputs as in the run before, or encode into a new folder"
        )


def _summary(job: Files | Folder, tokenizer: Tokenizer, readable: int, failed: int) -> dict[str, object]:
    """What the command reports; the ratios are to the uncompressed pixels that were encoded (24 bits each).

    Tokens count with the bits they are stored in, codes with those that name one of K.
    """
    summary: dict[str, object] = {"out": job.out, "model": tokenizer.info.name, "images": job.encoded}
    more = {"mirrored": job.mirrored, "already_there": readable - job.encoded, "replaced": len(job.replaced)}
    more |= {"other_images": len(job.others), "same_under_other_ids": len(job.same), "failed": failed}
    summary |= {name: count for name, count in more.items() if count}
    if job.encoded:
        pixels = 3 * tokenizer.cfg.image_size**2
        summary["tokens_per_image"] = tokenizer.cfg.num_tokens
        summary["token_bytes_per_image"] = job.token_bytes // job.encoded
        if tokenizer.num_codes is not None:
            summary["token_bits_per_image"] = job.token_bits // job.encoded
        summary["compression"] = 8 * pixels * job.encoded / job.token_bits
        if job.caption_bytes:
            summary["compression_with_captions"] = 8 * pixels * job.encoded / (job.token_bits + 8 * job.caption_bytes)
    return summary

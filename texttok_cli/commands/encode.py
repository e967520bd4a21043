"""`texttok encode`: images and their captions to token files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from texttok_cli.commands.options import (
    BatchSizeOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    QuietOption,
)


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Images, folders, manifests (.jsonl, .csv), shards (.tar), or - for a list on stdin."),
    ],
    caption: Annotated[str | None, typer.Option(help="The caption, of one image.")] = None,
    captions: Annotated[Path | None, typer.Option(help="A captions.jsonl.")] = None,
    caption_field: Annotated[str | None, typer.Option(help="Which key of a shard's .json is the caption: measured, longest, ...")] = None,
    no_caption: Annotated[bool, typer.Option("--no-caption", help="Encode with the empty condition, and record that.")] = False,
    out: OutOption = None,
    dtype: Annotated[Literal["fp16", "fp32", "int8"], typer.Option(help="How tokens are stored.")] = "fp16",
    model: ModelOption = "texttok-32-128",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    batch_size: BatchSizeOption = 32,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn images into tokens.

    Image files: one IMAGE.tok.safetensors each, beside the image or in the folder OUT. Folders, manifests, shards and
    lists: shards of tokens with an index.json in the folder OUT. What is already there with the same image, caption
    and model is skipped.
    """

"""What `texttok eval` refuses before anything is computed: options that would do nothing, files that can't be written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from texttok_cli.errors import UsageError
from texttok_cli.metrics.protocols import REFERENCE_CAPTIONS, Protocol

COMPARES = {"compare", "html", "json", "quiet", "debug"}  # what --compare reads


def check_comparing(given: Mapping[str, str]) -> None:
    """UsageError for an option that measures something, beside --compare."""
    why = "does not go with --compare, which measures nothing: its table goes to stdout, as JSON with --json, or to --html"
    _refuse(given, sorted(given.keys() - COMPARES), why)


def check_used(given: Mapping[str, str], names: Sequence[str], protocol: Protocol | None) -> None:
    """UsageError for an option that would change nothing of what is asked for."""
    from texttok_cli.metrics.registry import uses_clip, uses_inception

    clip, generated = uses_clip(names), "samples" in given
    if generated:
        about_models = ("model", "data", "images", "size", "no_caption", "precision")
        _refuse(given, about_models, "is about what a model reconstructs; it does not go with --samples")
        if not clip:
            compared = protocol is not None and protocol.labels == REFERENCE_CAPTIONS  # the references' captions, with the prompts
            _refuse(
                given,
                ("captions",) if compared else ("captions", "caption_field"),
                "says what CLIP compares samples with: add --metric clip-score, or leave it out",
            )
    else:
        _refuse(given, ("ref",), "goes with --samples; a model's references are the images that it reconstructs")
    if not clip:
        _refuse(given, ("clip", "clip_weights"), "says which CLIP is used: add --metric clip-score, or leave it out")
    if not uses_inception(names) and "save_stats" not in given:
        _refuse(given, ("resize", "inception"), "is about InceptionV3, which none of these metrics uses: leave it out")
    if "html" not in given:
        _refuse(given, ("gallery",), "is about the page that --html writes")


def check_one_model(given: Mapping[str, str]) -> None:
    """UsageError for a file of the images of one model, of which there are several."""
    _refuse(given, ("save_stats", "save_samples"), "is of one model's images: give one --model with it")


def check_targets(targets: Mapping[str, Path | None]) -> None:
    """UsageError for a file that could not be written in the end, by its option."""
    taken: dict[Path, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{option} {path}: is a folder; name a file in it")
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise UsageError(f"{option} {path}: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{option} {path}: {folder} can't be written to")
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{option} {path}: is what {other} writes; name another file")


def _refuse(given: Mapping[str, str], options: Sequence[str], why: str) -> None:
    refused = next((given[option] for option in options if option in given), None)
    if refused is not None:
        raise UsageError(f"{refused} {why}")

"""The part of `texttok caption` that writes unseen captions of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from texttok_cli.commands.caption_backends import Settings
from texttok_cli.errors import DataError

if TYPE_CHECKING:
    from texttok_cli.captioners.store import CaptionLines
    from texttok_cli.captioners.unseen import CaptionBank
    from texttok_cli.data import Dataset

MOST_LISTED = 20  # short classes named in one line


def write_unseen(
    settings: Settings, training: Dataset, evaluation: Sequence[str], number: int, out: Path, *, seed: int, quiet: bool, json: bool
) -> bool:
    """`number` captions of each class into `out`; whether every class has them."""
    from texttok_cli.captioners.store import CaptionLines, provenance_of
    from texttok_cli.captioners.unseen import CaptionBank, unseen_captions
    from texttok_cli.console import emit, progress

    by_class = _by_class(training)
    bank = CaptionBank(by_class, evaluation)
    author = settings.load_writer(bank, seed)
    with CaptionLines(out, {**provenance_of(author, settings.max_words), "seed": seed}) as lines, progress(quiet=quiet) as bar:
        there = _captions_of(lines)
        _check_leaks(lines, bank)  # those of an earlier run, perhaps against other data
        already = sum(map(len, there.values()))
        wanting = sum(len(there.get(name, ())) < number for name in by_class)
        task = bar.add_task("writing", total=len(by_class), completed=len(by_class) - wanting, note="")
        for class_name, texts in unseen_captions(author, bank, number, there):
            lines.add({"class": class_name, "caption": text, "words": len(text.split())} for text in texts)
            bar.advance(task)
        _check_leaks(lines, bank)
        now = _captions_of(lines)
    short = {name: len(now.get(name, ())) for name in by_class if len(now.get(name, ())) < number}
    _say_short(short, number, len(by_class), author.failure)
    summary = {
        "out": str(out),
        "writer": author.backend,
        "classes": len(by_class),
        "captions": sum(map(len, now.values())),
        "already_there": already,
        "short_classes": len(short),
        "none_of_training_captions": len(training),
        "none_of_evaluation_captions": len(evaluation),
    }
    emit(summary, as_json=json)
    return not short


def evaluation_captions(name: str, caption_field: str | None) -> list[str]:
    """Captions of evaluation images: of a captions.jsonl or manifest, or of what else holds images."""
    from texttok_cli.data import open_dataset
    from texttok_cli.data.listings import caption_lines

    if name.endswith(".jsonl"):
        return [text for _, text in caption_lines(Path(name))]  # an image may have several
    found = [item.caption for item in open_dataset([name], caption_field=caption_field).items if item.caption is not None]
    if not found:
        raise DataError(f"--avoid {name}: its images have no captions")
    return found


def _by_class(dataset: Dataset) -> dict[str, list[str]]:
    """Captions of the images of each class. DataError for an image without class or caption."""
    found: dict[str, list[str]] = {}
    for item in dataset.items:
        if item.class_name is None or item.caption is None:
            what = "class" if item.class_name is None else "caption"
            raise DataError(f"{item.id}: has no {what}; unseen captions are made from training images with both (see --captions)")
        found.setdefault(item.class_name, []).append(item.caption)
    return found


def _captions_of(lines: CaptionLines) -> Mapping[str, list[str]]:
    there: dict[str, list[str]] = {}
    for row in lines.rows():
        there.setdefault(row["class"], []).append(row["caption"])
    return there


def _check_leaks(lines: CaptionLines, bank: CaptionBank) -> None:
    for row in lines.rows():
        if bank.has(row["caption"]):
            text = row["caption"][:60]
            raise DataError(f"{lines.path}: {row['class']}: {text!r} is a caption of these training or evaluation images; remove the file")


def _say_short(short: Mapping[str, int], number: int, classes: int, failure: str | None) -> None:
    from texttok_cli.console import say

    if short:
        listed = ", ".join(f"{name} ({count})" for name, count in list(short.items())[:MOST_LISTED])
        more = ", ..." if len(short) > MOST_LISTED else ""
        say(
            f"fewer than {number} unseen captions: {len(short):,} of {classes:,} classes: {listed}{more}"
            + (f"; the last failure: {failure}" if failure else "")
        )

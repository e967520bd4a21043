"""A dataset through a captioner: in batches, or with several calls under way at the same time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texttok_cli.captioners.base import Captioner, CaptionFailed, CaptionInput, Written, limit_words
from texttok_cli.captioners.pool import concurrently
from texttok_cli.captioners.store import CaptionLines, provenance_of
from texttok_cli.data import Dataset, Item, load_image
from texttok_cli.errors import DataError

Outcome = Written | CaptionFailed


@dataclass(frozen=True, slots=True)
class Captioned:
    """What `write_captions` did: images whose captions it wrote, of these the ones cut at their limit, and images that had one."""

    path: Path
    written: int
    cut: int
    already_there: int


def write_captions(
    captioner: Captioner,
    dataset: Dataset,
    out: str | Path,
    *,
    max_words: int = 75,
    batch_size: int = 16,
    on_error: Callable[[str, str], None] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Captioned:
    """A line for each image of a dataset into the file `out`, batch by batch, as `texttok caption -o` writes it and `open_dataset(...,
    captions=out)` reads it; images that are in it already are skipped.

    Captions are cut at `max_words`. An image without a caption goes to `on_error(id, reason)` and is left out, or else ends it;
    `on_progress(done, total)` counts those as well.

    Raises DataError for a file of another captioner, model, prompt or limit, a caption in it that is of another image, while another
    process writes there, and without `on_error` for an image without a caption; BackendError as the captioner does.
    """
    written = cut = 0
    with CaptionLines(Path(out), provenance_of(captioner, max_words)) as lines:
        todo = _todo(dataset, lines, on_progress)
        done = already_there = len(dataset) - len(todo)
        for outcomes in caption_dataset(captioner, dataset, todo, batch_size=batch_size):
            found = [(dataset.items[index], outcome, sha256) for index, outcome, sha256 in outcomes]
            rows = [_row(item, outcome, sha256, max_words) for item, outcome, sha256 in found if isinstance(outcome, Written)]
            lines.add(rows)
            written += len(rows)
            cut += sum("cut" in row for row in rows)
            for item, outcome, _ in found:
                if isinstance(outcome, CaptionFailed):
                    (on_error or _refuse)(item.id, str(outcome))
            done += len(outcomes)
            on_progress(done, len(dataset))
    return Captioned(lines.path, written, cut, already_there)


def caption_dataset(
    captioner: Captioner, dataset: Dataset, indices: Sequence[int], *, batch_size: int
) -> Iterator[list[tuple[int, Outcome, str | None]]]:
    """The items `indices` of a dataset -> their indices with what was written of each, or why nothing was, as it comes.

    Third is the sha256 of the file's bytes, None if they could not be had. An image that can't be read and a text that is
    empty are failures too. Raises BackendError as the captioner does.
    """
    if captioner.concurrency:  # one image a call
        yield from (part for _, part in concurrently(lambda i: _caption(captioner, dataset, [i]), indices, captioner.concurrency))
        return
    for start in range(0, len(indices), batch_size):
        yield _caption(captioner, dataset, indices[start : start + batch_size])


def _caption(captioner: Captioner, dataset: Dataset, indices: Sequence[int]) -> list[tuple[int, Outcome, str | None]]:
    inputs: dict[int, CaptionInput] = {}
    hashes: dict[int, str] = {}
    outcomes: dict[int, Outcome] = {}
    for index in indices:
        item = dataset.items[index]
        try:
            data = dataset.read(index)
            hashes[index] = hashlib.sha256(data).hexdigest()
            inputs[index] = CaptionInput(load_image(data, name=item.id), item.class_name, item.caption)
        except DataError as err:
            outcomes[index] = CaptionFailed(str(err).removeprefix(f"{item.id}: "))
    if inputs:
        for index, outcome in zip(inputs, captioner(list(inputs.values())), strict=True):
            empty = isinstance(outcome, Written) and not outcome.text.split()
            outcomes[index] = CaptionFailed("the model wrote nothing") if empty else outcome
    return [(index, outcomes[index], hashes.get(index)) for index in indices]


def _todo(dataset: Dataset, lines: CaptionLines, on_progress: Callable[[int, int], None]) -> list[int]:
    """Indices of the images that have no line yet. DataError if the line is of another image; older ones don't say of which."""
    there = {row.get("id"): row.get("input_sha256") for row in lines.rows()}
    todo = []
    for index, item in enumerate(dataset.items):
        if item.id not in there:
            todo.append(index)
            continue
        sha256 = there[item.id]
        if sha256 is not None and sha256 != hashlib.sha256(dataset.read(index)).hexdigest():
            raise DataError(f"{lines.path}: its caption of {item.id} is of another image than {item.file}; give another file with -o")
        on_progress(index + 1 - len(todo), len(dataset))
    return todo


def _row(item: Item, written: Written, sha256: str | None, max_words: int) -> dict[str, Any]:
    text, was_cut = limit_words(written, max_words)
    row: dict[str, Any] = {"id": item.id, "caption": text, "words": len(text.split()), "input_sha256": sha256}
    if was_cut:
        row["cut"] = True
    return row if item.class_name is None else {**row, "class": item.class_name}


def _refuse(image_id: str, reason: str) -> None:
    raise DataError(f"{image_id}: {reason}")

"""A dataset through a captioner: in batches, or with several calls under way at the same time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from texttok_cli.captioners.base import Captioner, CaptionFailed, CaptionInput, Written
from texttok_cli.captioners.pool import concurrently
from texttok_cli.data import Dataset, load_image
from texttok_cli.errors import DataError

Outcome = Written | CaptionFailed


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

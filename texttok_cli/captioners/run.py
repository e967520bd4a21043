"""A dataset through a captioner: in batches, or with several calls under way at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from texttok_cli.captioners.base import Captioner, CaptionFailed, Subject, Written
from texttok_cli.captioners.pool import concurrently
from texttok_cli.data import Dataset, load_image
from texttok_cli.errors import DataError

Outcome = Written | CaptionFailed


def caption_dataset(
    captioner: Captioner, dataset: Dataset, indices: Sequence[int], *, batch_size: int
) -> Iterator[list[tuple[int, Outcome]]]:
    """The items `indices` of a dataset -> their indices with what was written of each, or why nothing was, as it comes.

    An image that can't be read and a text that is empty are failures too. Raises BackendError as the captioner does.
    """
    if captioner.concurrency:  # one image a call
        yield from (part for _, part in concurrently(lambda i: _caption(captioner, dataset, [i]), indices, captioner.concurrency))
        return
    for start in range(0, len(indices), batch_size):
        yield _caption(captioner, dataset, indices[start : start + batch_size])


def _caption(captioner: Captioner, dataset: Dataset, indices: Sequence[int]) -> list[tuple[int, Outcome]]:
    subjects: dict[int, Subject] = {}
    outcomes: dict[int, Outcome] = {}
    for index in indices:
        try:
            subjects[index] = _subject(dataset, index)
        except DataError as err:
            outcomes[index] = CaptionFailed(str(err).removeprefix(f"{dataset.items[index].id}: "))
    if subjects:
        for index, outcome in zip(subjects, captioner(list(subjects.values())), strict=True):
            empty = isinstance(outcome, Written) and not outcome.text.split()
            outcomes[index] = CaptionFailed("the model wrote nothing") if empty else outcome
    return [(index, outcomes[index]) for index in indices]


def _subject(dataset: Dataset, index: int) -> Subject:
    item = dataset.items[index]
    return Subject(load_image(dataset.read(index), name=item.id), item.class_name, item.caption)

"""Which reference each sample belongs to, for metrics of pairs."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from texttok_cli.data import Dataset
from texttok_cli.data.items import IMAGE_SUFFIXES
from texttok_cli.errors import DataError
from texttok_cli.metrics.sources import FileImages, Images


def match_by_name(references: Dataset, samples: Images) -> Dataset:
    """The references in the order of the samples of the same name; by position where the samples have no names (.npz)."""
    if not isinstance(samples, FileImages):
        return by_number(references)
    by_name = {_stem(item.id): item for item in references.items}
    if len(by_name) < len(references.items):
        twice = next(name for name, n in Counter(_stem(item.id) for item in references.items).items() if n > 1)
        raise DataError(f"{twice}: two references differ only in file extension; a sample could belong to either")
    unmatched = [sample_id for sample_id in samples.ids if _stem(sample_id) not in by_name]
    if unmatched:
        raise DataError(f"{unmatched[0]}: no reference with that name ({len(unmatched):,} of {len(samples.ids):,} samples have none)")
    return Dataset([by_name[_stem(sample_id)] for sample_id in samples.ids], references.skipped)


def by_number(images: Dataset) -> Dataset:
    """Images whose others have only positions: by their numbers where all names are numbers (10 after 9), else as sorted."""
    if not all(_stem(item.id).isdecimal() for item in images.items):  # ² is a digit, but `int` reads none
        return images
    return Dataset(sorted(images.items, key=lambda item: int(_stem(item.id))), images.skipped)


def check_pairs(samples: Images | None, references: Images | None, ref: str | None) -> None:
    """DataError where not every sample has one reference of its size."""
    if references is None or samples is None:
        raise DataError(f"{ref or '--ref'}: these metrics compare each sample with its original: give images with --ref")
    if len(samples.ids) != len(references.ids):
        raise DataError(f"{len(samples.ids):,} samples and {len(references.ids):,} references: the numbers must be equal")
    if samples.size != references.size:
        raise DataError(f"samples of {samples.size} and references of {references.size} pixels a side can't be compared")


def _stem(image_id: str) -> str:
    """Without the ending of an image file; `v1.5` has none."""
    path = PurePosixPath(image_id)
    return path.with_suffix("").as_posix() if path.suffix.lower() in IMAGE_SUFFIXES else image_id

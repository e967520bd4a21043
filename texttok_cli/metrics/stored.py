"""Samples that are there already, and what they are compared with, to be measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from torch import Tensor

from texttok_cli.data import Dataset, Item, open_dataset
from texttok_cli.data.items import IMAGE_SUFFIXES
from texttok_cli.data.listings import with_captions
from texttok_cli.errors import DataError
from texttok_cli.files import sha256_file
from texttok_cli.metrics.registry import uses_clip, uses_pairs
from texttok_cli.metrics.sample_run import SampleRun, sample_run
from texttok_cli.metrics.sources import FileImages, Images, NpzImages, Reference, TensorImages, read_npz_reference
from texttok_cli.metrics.subject import Subject, caption_source, captions_of, names_of

Source: TypeAlias = "str | Path | Tensor | Iterable[Tensor]"  # tensors are uint8 (n, 3, S, S)
IN_MEMORY = "tensors"  # what a card calls images of no file


def open_stored(
    samples: Source, references: Source | None, metrics: Sequence[str], *, captions: Path | None, caption_field: str | None
) -> Subject:
    """Samples as they are stored, and references: statistics, or images, those of files cropped by ADM's rule to the samples' size.

    Of the folder that `texttok sample` wrote the card learns how they were made. If a metric compares pairs, each sample belongs
    to the reference of its name (of its position, if either is an .npz or tensors).
    """
    paired, compared = uses_pairs(metrics), uses_clip(metrics)
    found: Images
    if isinstance(samples, str | Path):
        numbered = paired and references is not None and _by_position(references)
        run = sample_run(str(samples))
        found, classes, texts = _stored(run, numbered=numbered, compared=compared, captions=captions, caption_field=caption_field)
    else:
        run, found, classes = SampleRun(IN_MEMORY), TensorImages(samples), None
        texts = _captions_by_position(found, captions, None) if compared else None
    jpegs = found.jpegs() if isinstance(found, FileImages) else 0
    against, theirs = _references(references, found, paired=paired, caption_field=caption_field)
    if paired:
        _check_pairs(found, against.images, str(references) if isinstance(references, str | Path) else None)
    card = {
        **run.card,
        "samples": _name(samples),
        "reference": None if references is None else _name(references),
        "reference_sha256": _identity(references, against),
        "uint8": f"as stored, {jpegs:,} of them as JPEG (lossy)" if jpegs else "as stored",
        "text": None if texts is None else f"compared with the samples: {caption_source(captions, caption_field)}",
        "labels": run.prompts_among(theirs),
    }
    return Subject(
        "reconstruction" if paired else "generation",
        found,
        against.images,
        card,
        paired,
        given=against.given,
        captions=texts,
        classes=classes,
        jpegs=jpegs,
        reference_size=against.size,
    )


def _stored(
    run: SampleRun, *, numbered: bool, compared: bool, captions: Path | None, caption_field: str | None
) -> tuple[NpzImages | FileImages, Sequence[Hashable] | None, Sequence[str] | None]:
    """The samples (by their numbers, if so), the class of each where all have one, and their captions if these are `compared`."""
    found: NpzImages | FileImages
    if _by_position(run.samples):
        found = NpzImages(Path(run.samples))
        classes: Sequence[Hashable] | None = found.labels()
        texts = _captions_by_position(found, captions, run.captions) if compared else None
    else:
        opened = open_dataset([run.samples], captions=captions, caption_field=caption_field)
        dataset = by_number(opened) if numbered else opened
        found = FileImages(dataset)
        classes = [item.class_name for item in dataset.items]
        texts = captions_of(dataset) if compared else None
    if classes is not None and None in classes:
        classes = None
    return found, classes if run.classes is None else run.classes, texts


def _captions_by_position(samples: Images, captions: Path | None, own: Sequence[str] | None) -> Sequence[str]:
    """Of a captions.jsonl whose ids are positions, from 0; else the run's `own`."""
    if captions is None:
        if own is None:
            kind = "samples in an .npz" if isinstance(samples, NpzImages) else IN_MEMORY
            raise DataError(f"{kind} have no captions: give --captions FILE.jsonl whose ids are their positions, from 0")
        return own
    return captions_of(Dataset(with_captions([Item(position, str(captions)) for position in samples.ids], captions)))


def _references(
    references: Source | None, samples: Images, *, paired: bool, caption_field: str | None
) -> tuple[Reference, Sequence[str | None] | None]:
    """The references, in the order of the samples if they are their originals, and their captions, of which files have some."""
    if references is None:
        return Reference({}, None, None), None
    if not isinstance(references, str | Path):
        images = TensorImages(references)
        return Reference({}, images, images.size), None
    if _by_position(references):
        return read_npz_reference(Path(references)), None
    dataset = open_dataset([references], caption_field=caption_field)
    originals = FileImages(_match_by_name(dataset, samples) if paired else dataset, crop_to=samples.size)
    return Reference({}, originals, None), [item.caption for item in dataset.items]


def _identity(references: Source | None, found: Reference) -> str | None:
    if found.given:
        return sha256_file(Path(str(references)))
    return None if found.images is None else found.images.identity()


def _by_position(source: Source) -> bool:
    """Whether its images have no names."""
    return not isinstance(source, str | Path) or str(source).endswith(".npz")


def _name(source: Source) -> str:
    return names_of([source]) if isinstance(source, str | Path) else IN_MEMORY


# ------------------------------------------------------------------ pairs


def _match_by_name(references: Dataset, samples: Images) -> Dataset:
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


def _check_pairs(samples: Images | None, references: Images | None, ref: str | None) -> None:
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

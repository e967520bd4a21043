"""The images that the page of `texttok eval` shows: the best, the median and the worst by PSNR.

Letters: n images, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from texttok_cli.bench.eval_page import Example, Made
from texttok_cli.data import evenly_spaced
from texttok_cli.metrics.passes import Pass
from texttok_cli.metrics.sources import Images
from texttok_cli.metrics.subject import Subject


def pick_examples(passes: Sequence[Pass], *, each: int) -> list[Example]:
    """After an evaluation `each` images a rank by the first model's PSNR; of samples without originals as many, at even distances.

    Reconstructions are made again, which costs less than to keep those of a whole pass.
    """
    subjects = [one.subject for one in passes]
    first = subjects[0]
    if first.paired:
        found = [one.evaluator.evidence.by_image["psnr"].in_order() for one in passes]
        qualities: list[Tensor | None] = [*found]
        ranks = by_rank(found[0], each)
    else:
        qualities, ranks = [None], {"": evenly_spaced(len(first.measured.ids), 3 * each)}
    numbers = sorted(number for chosen in ranks.values() for number in chosen)
    originals = _read(first.references, numbers) if first.paired else {}
    made = [_made(subject, quality, numbers, originals) for subject, quality in zip(subjects, qualities, strict=True)]
    return [
        Example(rank, first.measured.ids[number], _caption(subjects, number), originals.get(number), [images[number] for images in made])
        for rank, chosen in ranks.items()
        for number in chosen
    ]


def by_rank(quality: Tensor, each: int) -> dict[str, list[int]]:
    """Indices of the best, of those in the middle and of the worst of n values, best first; no index is in two ranks."""
    order: list[int] = quality.argsort(descending=True, stable=True).tolist()
    n = len(order)
    each = min(each, -(-n // 3))
    worst = max(each, n - each)
    middle = order[each:worst]
    skip = (len(middle) - min(each, len(middle))) // 2
    return {"Best": order[:each], "Median": middle[skip : skip + each], "Worst": order[worst:]}


def _made(subject: Subject, quality: Tensor | None, numbers: Sequence[int], originals: dict[int, Tensor]) -> dict[int, Made]:
    """By index, what a model makes of the originals, or the samples that are there already."""
    if subject.reconstruct is None:
        images = _read(subject.samples, numbers)
    else:
        # One at a time: a batch of many large images may not fit where a pass in small ones did.
        images = {number: subject.reconstruct(torch.stack([originals[number]]), [number])[0] for number in numbers}
    has_text = None if subject.reconstruct is None else subject.texts is not None
    name, tokens = subject.card["samples"], subject.card.get("tokens")
    return {n: Made(name, tokens, has_text, images[n], None if quality is None else float(quality[n])) for n in numbers}


def _read(images: Images | None, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Uint8 (3, S, S) by index."""
    assert images is not None
    return {int(number): image for chosen, batch in images.batches(numbers, 1) for number, image in zip(chosen, batch, strict=True)}


def _caption(subjects: Sequence[Subject], number: int) -> str | None:
    """What a model was conditioned on, else what the images were compared with."""
    texts = next((texts for subject in subjects for texts in (subject.texts, subject.captions) if texts is not None), None)
    return texts[number] if texts is not None else None

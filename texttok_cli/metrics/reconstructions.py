"""Images of a data set and what models make of them, to be measured.

Letters: B batch, S image side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from texttok_cli.config.schema import TextCondition
from texttok_cli.data import SAMPLE_SET, Dataset, evenly_spaced, open_dataset
from texttok_cli.data.labels import ids_among
from texttok_cli.data.texts import texts_for
from texttok_cli.errors import DataError, UsageError
from texttok_cli.metrics.registry import uses_clip
from texttok_cli.metrics.sources import FileImages
from texttok_cli.metrics.subject import Subject, caption_source, captions_of, names_of
from texttok_cli.text import EmbeddingCache, cut_off

ANY_SIZE = 256  # side of the images where no model says it


class Identity(Protocol):
    """Which model it is."""

    @property
    def name(self) -> str:
        """For people; never a path."""

    @property
    def sha256(self) -> str:
        """Of its file."""


class Autoencoder(Protocol):
    """What makes tokens of images and images of them: a `Tokenizer`, or one of `texttok_cli.baselines`."""

    @property
    def info(self) -> Identity:
        """Which one it is."""

    @property
    def precision(self) -> str:
        """It computes in."""

    @property
    def image_size(self) -> int | None:
        """S of the images that it takes; None: of any."""

    @property
    def text(self) -> EmbeddingCache | None:
        """Its text encoder."""

    @property
    def text_condition(self) -> TextCondition | None:
        """How text conditions it; None for one without text."""

    @property
    def classes(self) -> Sequence[str] | None:
        """Names by id of the classes that condition it, which it takes in the place of captions; None for one without."""

    def token_counts(self, side: int) -> Mapping[str, int]:
        """What the card says of the tokens of an image: `tokens`, and `channels` or `codes`."""

    def encode(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Images uint8 (B, 3, S, S) to latents."""

    def decode(self, z: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Latents to images uint8 (B, 3, S, S)."""


def open_reconstructions(
    models: Sequence[Autoencoder],
    data: Sequence[str | Path] | None,
    metrics: Sequence[str],
    *,
    size: int | None,
    limit: int | None,
    captions: Path | None,
    caption_field: str | None,
    no_caption: bool,
) -> list[Subject]:
    """Images of `data` (None: the sample set of the package), cropped by ADM's rule, and what each model reconstructs of them.

    The side of the crop is the models' own; those that take any take the others', or `size`.
    """
    clip = uses_clip(metrics)
    if no_caption and captions is not None and not clip:
        raise UsageError("--captions and --no-caption exclude each other")
    if captions is not None and not clip and all(model.text_condition is None for model in models):
        raise UsageError(f"{models[0].info.name}: takes no captions, and no metric reads them: leave out --captions")
    side = _common_size(models, size)
    dataset = open_dataset(data or [SAMPLE_SET], captions=captions, caption_field=caption_field)
    if limit is not None:
        dataset = Dataset([dataset.items[i] for i in evenly_spaced(len(dataset), limit)], dataset.skipped)
    originals = FileImages(dataset, crop_to=side)
    common = {
        "reference": names_of(data or [SAMPLE_SET]),
        "reference_sha256": originals.identity(),
        "uint8": "rounds half up",
        "split": None if data else "val",
    }
    compared = captions_of(dataset) if clip else None
    source = "none (--no-caption)" if no_caption else caption_source(captions, caption_field)

    def subject(model: Autoencoder) -> Subject:
        condition, texts, said = model.text_condition, None, None
        if condition is not None:
            texts = [""] * len(dataset) if no_caption else texts_for(dataset.items, condition, caption_field=caption_field)
            said = source if no_caption else f"{condition.source}: {source}"
        classes = None if model.classes is None else _classes_of(dataset, model.classes)
        if classes is not None:
            if no_caption:
                raise UsageError(f"{model.info.name}: is conditioned on classes and has no empty condition: leave out --no-caption")
            said = "class_embedding: the images' classes"
        card: dict[str, Any] = {
            **common,
            **model.token_counts(side),
            "samples": model.info.name,
            "model_sha256": model.info.sha256,
            "text": said,
            "precision": model.precision,
        }
        cut = None if texts is None or model.text is None else cut_off(model.text.encoder, texts)
        again = _reconstruction(model, texts if classes is None else classes)
        return Subject(
            "reconstruction",
            None,
            originals,
            card,
            paired=True,
            captions=compared,
            texts=texts,
            classes=classes,
            reconstruct=again,
            cut_off=cut,
        )

    return [subject(model) for model in models]


def _classes_of(dataset: Dataset, known: Sequence[str]) -> list[str]:
    """The class of each image. DataError names one that has none, or one that is not `known`, before anything is computed."""
    return [known[i] for i in ids_among(known, ((item.id, item.class_name) for item in dataset.items))]


def _common_size(models: Sequence[Autoencoder], size: int | None) -> int:
    """The side of the images that all models are measured on; DataError names two that differ."""
    own = [(model.info.name, model.image_size) for model in models if model.image_size is not None]
    if not own:
        return size or ANY_SIZE
    name, side = own[0]
    if size not in (None, side):
        raise DataError(f"--size {size}: {name} takes images of {side} pixels only")
    for other, other_side in own[1:]:
        if other_side != side:
            raise DataError(
                f"{name} takes images of {side} pixels and {other} of {other_side}: measure them separately, and --compare the reports"
            )
    return side


def _reconstruction(model: Autoencoder, texts: Sequence[str] | None) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def reconstruct(images: Tensor, indices: Sequence[int]) -> Tensor:
        chosen = None if texts is None else [texts[index] for index in indices]
        return model.decode(model.encode(images, chosen), chosen)

    return reconstruct

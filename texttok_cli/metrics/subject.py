"""What is measured: samples and their references, or images and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from texttok_cli.data import Dataset
from texttok_cli.errors import DataError
from texttok_cli.metrics.registry import METRICS, OF_RECONSTRUCTIONS, check_images
from texttok_cli.metrics.sources import Images
from texttok_cli.metrics.statistics import Gaussian


@dataclass(frozen=True)
class Subject:
    """Images to measure, and what a protocol card says of them whatever the metric."""

    task: Literal["reconstruction", "generation"]
    samples: Images | None
    references: Images | None
    card: Mapping[str, Any]
    paired: bool
    given: Mapping[str, Gaussian] = field(default_factory=dict)
    captions: Sequence[str] | None = None  # what samples are compared with
    texts: Sequence[str] | None = None  # what the model is conditioned on
    reconstruct: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    classes: Sequence[Hashable] | None = None  # of the samples in their order, where each one's is known
    jpegs: int = 0  # of the samples
    reference_size: int | None = None  # side of the images that statistics are of, where it is known
    cut_off: str | None = None  # what to say of `texts` that the model's text encoder does not read to their end

    @property
    def measured(self) -> Images:
        """Whose number is n: the samples, or the images that are reconstructed."""
        images = self.references if self.samples is None else self.samples
        assert images is not None
        return images

    def check(self, metrics: Iterable[str], *, statistics: bool) -> None:
        """DataError unless every metric, and the `statistics` if they are wanted, have what they need and are of what they say."""
        for name in metrics:
            if self.task == "reconstruction" and name in OF_RECONSTRUCTIONS:
                raise DataError(f"{name}: is of generated samples, and these are reconstructions: take {OF_RECONSTRUCTIONS[name]}")
            metric = METRICS[name]
            missing = {need for need in metric.needs if need not in self.given} if metric.reference else set()
            if metric.reference and self.references is None and (missing or not metric.needs):
                if self.given:
                    raise DataError(f"{name}: {self.card['reference']} has neither the statistics it needs nor images")
                raise DataError(f"{name}: needs references: name their images, or for fid and sfid their statistics, with --ref")
        if statistics and len(self.measured.ids) < 2:
            raise DataError("--save-stats: a covariance needs 2 images or more")
        counted = None if self.references is None else len(self.references.ids)
        check_images(metrics, n=len(self.measured.ids), n_reference=counted, side=self.measured.size)


def names_of(sources: Iterable[str | Path]) -> str:
    """The last part of each path: a report names what was measured, not where it lay."""
    return ", ".join(Path(source).name for source in sources)


def caption_source(captions: Path | None, caption_field: str | None) -> str:
    """Where captions are from, for the card."""
    return captions.name if captions else caption_field or "first caption"


def captions_of(dataset: Dataset) -> list[str]:
    """The caption of each image. DataError names one that has none."""
    without = next((item.id for item in dataset.items if item.caption is None), None)
    if without is not None:
        raise DataError(f"{without}: has no caption to compare it with; give --captions FILE.jsonl")
    return [item.caption or "" for item in dataset.items]

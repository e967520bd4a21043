"""The report: every number with its protocol card, and the comparison of reports, which says where cards differ."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field

from texttok_cli import __version__
from texttok_cli.config.schema import Config
from texttok_cli.errors import DataError
from texttok_cli.files import parse_header, read_json_object, write_json

FORMAT = 1
PACKAGES = ("torch", "numpy", "pillow")
# What must be equal for two numbers to be compared.
MUST_AGREE = (
    "rule",
    "task",
    "reference",
    "reference_sha256",
    "split",
    "size",
    "crop",
    "uint8",
    "resize",
    "network",
    "network_sha256",
    "n",
    "n_reference",
    "captions_sha256",
    "labels",
)
# What a comparison may be about, or may have differ by mistake: said where it differs, as are the versions. The rest says which model
# it is (samples, model_sha256, tokenizer_sha256, tokens, channels, codes) or follows from other fields (protocol, captions_truncated).
MAY_DIFFER = ("text", "unseen_captions_sha256", "seed", "sampler", "steps", "guidance", "guide_sha256", "precision")


class Card(Config):
    """How a number came about. None: does not apply, or what made the samples did not say."""

    rule: str  # the metric's exact definition
    protocol: str | None
    task: Literal["reconstruction", "generation"]
    samples: str  # a model's name, or the name of what holds the samples
    model_sha256: str | None
    reference: str | None  # name of what holds the references
    reference_sha256: str | None  # of their ids and bytes' sizes, or of the .npz; no place or time is in it
    split: str | None
    size: int  # side of the samples in pixels
    crop: str | None  # of the references
    uint8: str
    resize: str | None  # to the feature network's 299 pixels
    network: str | None
    network_sha256: str | None
    n: int
    n_reference: int | None
    text: str | None  # what conditioned the model, or was compared with the samples
    captions_truncated: int | None  # by CLIP
    captions_sha256: str | None = None  # of the captions that the samples are compared with, in any order
    labels: str | None
    seed: str | None
    sampler: str | None
    steps: str | None
    guidance: str | None
    guide_sha256: str | None = None  # of the weaker generator that guided, if one did
    tokenizer_sha256: str | None = None  # of the tokenizer whose detokenizer made the samples
    unseen_captions_sha256: str | None = None  # of the list of captions that the detokenizer of a class model read
    precision: str | None  # of the model; the networks that measure compute in float32
    tokens: int | None = None  # that the model makes of an image
    channels: int | None = None  # numbers in each of them; None for a VQ model's
    codes: int | None = None  # that each of them is one of, for a VQ model
    versions: dict[str, str]


class Result(Config):
    """One number. `value` is None where it is not finite; a warning says why."""

    metric: str
    value: float | None
    spread: float | None = None
    card: Card
    warnings: list[str] = Field(default_factory=list)

    def readable(self) -> str:
        """The number as a person reads it, with its spread if it has one."""
        number = "not finite" if self.value is None else f"{self.value:.4f}"
        return number if self.spread is None else f"{number} ± {self.spread:.4f}"


class Report(Config):
    """The numbers of one evaluation: of one model or set of samples, or of several one after the other."""

    texttok_report: int = FORMAT
    results: list[Result]


def make_result(metric: str, value: float, spread: float | None, card: Card, *, enough: int, why: str, also: Sequence[str] = ()) -> Result:
    """A number with the warnings it needs: too few images, or not finite, and what else there is to say of it."""
    warnings = []
    sets = {"samples": card.n, "references": card.n_reference}
    small = [f"{n:,} {what}" for what, n in sets.items() if n is not None and n < enough]
    if small:
        warnings.append(f"{' and '.join(small)}: {why}")
    if not math.isfinite(value):
        warnings.append("not finite: some images equal their originals" if value == math.inf else "not finite")
    return Result(metric=metric, value=value if math.isfinite(value) else None, spread=spread, warnings=[*warnings, *also], card=card)


def versions() -> dict[str, str]:
    """The versions of the software that computed the numbers: texttok, Python and PACKAGES."""
    return {"texttok": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def captions_sha256(captions: Sequence[str]) -> str:
    """Hex digest of a set of captions."""
    return hashlib.sha256(json.dumps(sorted(captions)).encode()).hexdigest()


def save_report(path: str | Path, report: Report) -> None:
    """Write it as JSON, atomically."""
    write_json(Path(path), report.model_dump(mode="json"))


def load_report(path: str | Path) -> Report:
    """A report, checked. DataError names what is wrong."""
    path = Path(path)
    value = read_json_object(path, kind="report", error=DataError)
    return parse_header(value, Report, key="texttok_report", version=FORMAT, path=path, error=DataError)


def by_samples(report: Report) -> list[Report]:
    """A report for each model or set of samples, which their cards name."""
    found: dict[tuple[str, str | None], list[Result]] = {}
    for result in report.results:
        found.setdefault((result.card.samples, result.card.model_sha256), []).append(result)
    return [Report(results=results) for results in found.values()]


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """A metric in every report (None: not in it), and in which fields their cards differ: name -> the values, in order."""

    metric: str
    results: list[Result | None]
    unlike: Mapping[str, list[object]]

    @property
    def title(self) -> str:
        """The metric, and whether its numbers are unlike."""
        return self.metric + (" (differs)" if self.unlike else "")

    @property
    def cells(self) -> list[str]:
        """The numbers as a person reads them; empty for a report that has none."""
        return ["" if result is None else result.readable() for result in self.results]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Reports side by side: a row for each metric, and in what else their cards differ: field -> its value in each report."""

    rows: list[MetricComparison]
    also: Mapping[str, list[str | None]]

    def remark(self, names: Sequence[str]) -> str:
        """What else differs, and which of the reports of these `names` have what, as one line."""
        return "also different: " + "; ".join(f"{field}: {_groups(values, names)}" for field, values in self.also.items())


def compare(reports: Sequence[Report]) -> Comparison:
    """The reports, of one model or set of samples each, side by side."""
    by_name = [{result.metric: result for result in report.results} for report in reports]
    metrics = list(dict.fromkeys(name for found in by_name for name in found))
    return Comparison([_comparison(metric, [found.get(metric) for found in by_name]) for metric in metrics], _also(reports))


def _comparison(metric: str, results: list[Result | None]) -> MetricComparison:
    cards = [result.card for result in results if result is not None]
    values: dict[str, list[object]] = {name: [getattr(card, name) for card in cards] for name in MUST_AGREE}
    return MetricComparison(metric, results, {name: found for name, found in values.items() if any(value != found[0] for value in found)})


def _also(reports: Sequence[Report]) -> dict[str, list[str | None]]:
    said = [_may_differ(report.results[0].card) if report.results else {} for report in reports]  # all metrics of a model have the same
    values = {field: [found.get(field) for found in said] for field in dict.fromkeys(field for found in said for field in found)}
    # None is no other value: it does not apply (text, to a model without), or is not known.
    return {field: found for field, found in values.items() if len({*found} - {None}) > 1}


def _may_differ(card: Card) -> dict[str, str | None]:
    return {name: getattr(card, name) for name in MAY_DIFFER} | {f"versions.{name}": found for name, found in card.versions.items()}


def _groups(values: Sequence[str | None], names: Sequence[str]) -> str:
    """Each value with the names that have it."""
    groups: dict[str, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        if value is not None:
            groups.setdefault(value, []).append(name)
    return " | ".join(f"{value} ({', '.join(group)})" for value, group in groups.items())

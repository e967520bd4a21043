"""Speed against quality (Fig. 4): every setting of a spec sampled, timed and scored, and what follows from the points."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from torch import Tensor

from texttok_cli.bench.curves import Comparison, Point, best, gain_at_equal_time, mean_gain, speedup_at_equal_fid
from texttok_cli.bench.results import PointResult, TradeoffResult
from texttok_cli.bench.timing import Timer
from texttok_cli.config import Labels
from texttok_cli.config.plain_yaml import parse_yaml
from texttok_cli.config.schema import Config
from texttok_cli.diffusion import Sampling, parse_cfg
from texttok_cli.errors import DataError, RecipeError
from texttok_cli.files import read_json_object, write_json


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Guidance = Annotated[str, Field(coerce_numbers_to_str=True)]  # cfg: 1.5 is a number of YAML's


class Series(Config):
    """A system and its settings: every combination is a point."""

    name: str = Field(min_length=1)
    generator: str  # a generator's file or bundled name, or baseline:dit=FILE, the original DiT
    # Its file, where the generator's own can't be found by its hash; of the original DiT baseline:sd-vae=FOLDER.
    tokenizer: str | None = None
    captions: Path | None = None  # class models: unseen captions instead of those beside the generator's file
    labels: Labels = "equal"  # class models: as `texttok sample --labels`
    prompts: Path | None = None  # text models: as `texttok sample --prompts`; the first of them are used
    steps: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_listed), Field(min_length=1)]
    sampler: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
    cfg: Annotated[list[Guidance], BeforeValidator(_listed), Field(min_length=1)]  # as `texttok sample --cfg`


class Spec(Config):
    """What `texttok bench tradeoff` is to do."""

    name: str = Field(pattern=r"^[^/\\.\x00][^/\\\x00]{0,255}$")  # of the files that it gives
    reference: str | None = None  # the series that the others are compared with
    ref: str | None = None  # reference images (folder, shard, manifest) or statistics (.npz) for the FID; --ref of the command wins
    images: int = Field(50_000, ge=2)  # samples of each point
    batch_size: int = Field(32, ge=1)
    seed: int = Field(0, ge=0)
    series: list[Series] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_agree(self) -> Spec:
        names = [series.name for series in self.series]
        if len(set(names)) < len(names):
            raise ValueError("two series have the same name")
        if self.reference not in (None, *names):
            raise ValueError(f"reference {self.reference!r} is not one of the series: {', '.join(names)}")
        return self


def load_spec(path: Path) -> Spec:
    """A spec from YAML. RecipeError names the first key that is wrong."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise RecipeError(f"{path}: {err.strerror}") from None
    except ValueError as err:
        raise RecipeError(f"{path}: not YAML: {err}") from None
    try:
        return Spec.model_validate(value)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{path}: {where or 'spec'}: {first['msg'].removeprefix('Value error, ')}") from None


@dataclass(frozen=True, slots=True)
class Setting:
    """One point to measure."""

    series: str
    steps: int
    sampler: str
    cfg: str

    @property
    def sampling(self) -> Sampling:
        """How it samples."""
        return Sampling(self.sampler, self.steps, parse_cfg(self.cfg))


def settings(series: Series) -> list[Setting]:
    """Every combination of a series, once: 1.5 and 1.50 are the same guidance. RecipeError for one that is none."""
    guidance = [str(parse_cfg(cfg)) for cfg in series.cfg]
    return list(dict.fromkeys(Setting(series.name, *choice) for choice in product(series.steps, series.sampler, guidance)))


# Numbers of the samples [0, n) of one batch -> uint8 images (B, 3, S, S). Sample i is the same in any batch.
Sample = Callable[[Setting, Sequence[int]], Tensor]
# All samples of a point, batch by batch -> their FID.
Score = Callable[[Iterator[tuple[Sequence[int], Tensor]]], float]


def measure_point(setting: Setting, sample: Sample, score: Score, timer: Timer, *, images: int, batch_size: int) -> PointResult:
    """Sample `images` images in batches: seconds an image are the median batch's (whole batches only, if there is one), without scoring."""
    seconds: list[tuple[int, float]] = []

    def batches() -> Iterator[tuple[Sequence[int], Tensor]]:
        for start in range(0, images, batch_size):
            numbers = range(start, min(start + batch_size, images))
            made: list[Tensor] = []
            took = timer.once(lambda numbers=numbers, made=made: made.append(sample(setting, numbers)))  # type: ignore[misc]
            seconds.append((len(numbers), took))
            yield numbers, made[0]

    fid = score(batches())
    if not math.isfinite(fid):
        raise DataError(f"{setting.series}, {setting.steps} steps, {setting.sampler}, cfg {setting.cfg}: its samples have no finite FID")
    largest = max(size for size, _ in seconds)
    median = statistics.median(took for size, took in seconds if size == largest)
    return PointResult(
        series=setting.series,
        steps=setting.steps,
        sampler=setting.sampler,
        cfg=setting.cfg,
        seconds_per_image=median / largest,
        fid=fid,
        images=images,
    )


class PointStore:
    """Points that are done, one file each, written whole: an interrupted sweep goes on where it was.

    `identity` is all that a point depends on besides its setting; a point of another identity has another name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, setting: Setting, identity: Mapping[str, object]) -> Path:
        """The file of one point."""
        whole = json.dumps([setting.series, setting.steps, setting.sampler, setting.cfg, identity], sort_keys=True)
        return self.folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:16]}.json"

    def load(self, setting: Setting, identity: Mapping[str, object]) -> PointResult | None:
        """The point, if it is done. DataError for a damaged file."""
        path = self.path(setting, identity)
        if not path.exists():
            return None
        try:
            return PointResult.model_validate(read_json_object(path, kind="result", error=DataError))
        except ValidationError:
            raise DataError(f"{path}: not a point of a sweep; remove it to measure it again") from None

    def save(self, setting: Setting, identity: Mapping[str, object], point: PointResult) -> None:
        """Write the point to its file, atomically."""
        write_json(self.path(setting, identity), point.model_dump(mode="json"))


# ------------------------------------------------------------------ what follows from the points


def curve(result: TradeoffResult, series: str) -> list[Point]:
    """The points of one series."""
    return [
        Point(f"{series}, {point.steps} steps, {point.sampler}, cfg {point.cfg}", point.seconds_per_image, point.fid)
        for point in result.points
        if point.series == series
    ]


@dataclass(frozen=True, slots=True)
class Summary:
    """The others against the best setting of the reference."""

    speedup: Comparison | None  # times faster at no worse FID
    gain: Comparison | None  # percent of FID at no more time


def summarize(result: TradeoffResult) -> Summary | None:
    """What the paper's Fig. 4 says of two curves; None without a reference or without points of both."""
    if result.reference is None:
        return None
    reference = curve(result, result.reference)
    others = [point for name in result.tokens if name != result.reference for point in curve(result, name)]
    if not reference or not others:
        return None
    return Summary(speedup_at_equal_fid(others, best(reference)), gain_at_equal_time(others, best(reference)))


@dataclass(frozen=True, slots=True)
class TextGain:
    """Mean relative gain in FID, in percent, by number of tokens; `guided` if guidance may be in it, as it is not in the paper's."""

    value: float
    guided: bool


def text_gain(result: TradeoffResult) -> TextGain | None:
    """Of the series named TexTok... over those named Baseline..., best against best.

    Without guidance, as the paper's is of Table 1; of all settings only where no pair has points without.
    """
    unguided = [point for point in result.points if point.cfg.partition(":")[0] == "1"]  # as `settings` writes it
    for points in (unguided, result.points):
        before, after = (_best_by_tokens(result, points, kinds) for kinds in (("baseline",), ("textok", "texttok")))
        if before.keys() & after.keys():
            return TextGain(mean_gain(before, after), guided=points is not unguided)
    return None


def _best_by_tokens(result: TradeoffResult, points: Sequence[PointResult], kinds: tuple[str, ...]) -> dict[int, float]:
    """Least FID by number of tokens of the series whose names begin so: what `mean_gain` compares (Sec. 4.3)."""
    found: dict[int, float] = {}
    for point in points:
        if point.series.lower().startswith(kinds):
            tokens = result.tokens[point.series]
            found[tokens] = min(found.get(tokens, point.fid), point.fid)
    return found

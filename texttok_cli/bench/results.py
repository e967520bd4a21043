"""What a benchmark leaves behind, as JSON: rows of times, ratios against their targets, points of a speed/quality curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from texttok_cli.bench.machine import Machine
from texttok_cli.bench.timing import Spread
from texttok_cli.config.schema import Config
from texttok_cli.errors import DataError
from texttok_cli.files import parse_header, write_json

KEY = "texttok_bench"  # its value is the format's version
FORMAT = 1

PaperSize = Literal[256, 512]


class Row(Config):
    """One time. `seconds` is of `batch` images (None: not measured, `skipped` says why)."""

    part: str  # text, encode, decode, generate, ...
    system: str  # what was timed: TexTok-32, SD-VAE-f8 + DiT-XL/2, ...
    image_size: int | None = None
    tokens: int | None = None
    batch: int = Field(1, ge=1)
    steps: int | None = None  # denoising steps
    seconds: Spread | None = None
    times: float = Field(1.0, ge=1)  # what was run, multiplied by this, is `seconds`; 1: all of it was run
    note: str = ""
    skipped: str = ""

    @property
    def seconds_per_image(self) -> float | None:
        """Median by image."""
        return None if self.seconds is None else self.seconds.median / self.batch


class Target(Config):
    """A ratio against what it should be."""

    name: str
    reached: float | None  # None: not measured, `note` says why
    least: float | None = None  # the target: at least this
    most: float | None = None  # or at most
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing was measured."""
        if self.reached is None or (self.least is None and self.most is None):
            return None
        return (self.least is None or self.reached >= self.least) and (self.most is None or self.reached <= self.most)


class LatencyResult(Config):
    """What `texttok bench latency` measured in one run."""

    texttok_bench: int = FORMAT
    kind: Literal["latency"] = "latency"
    weights: str  # whose
    precision: str
    machine: Machine
    rows: list[Row] = Field(default_factory=list)
    targets: list[Target] = Field(default_factory=list)


class PointResult(Config):
    """One setting of one system: what it costs and how good it is."""

    series: str
    steps: int = Field(ge=1)
    sampler: str
    cfg: str
    seconds_per_image: float = Field(gt=0)
    fid: float
    images: int = Field(ge=2)


class TradeoffResult(Config):
    """A speed/quality curve."""

    texttok_bench: int = FORMAT
    kind: Literal["tradeoff"] = "tradeoff"
    name: str
    machine: Machine
    reference: str | None  # the series that the others are compared with
    protocol: dict[str, str | int | float | None]  # of the FID
    tokens: dict[str, int]  # of each series
    points: list[PointResult]
    paper_size: PaperSize = 256  # which of the paper's curves is drawn beside ours

    @model_validator(mode="after")
    def _can_be_drawn(self) -> TradeoffResult:
        unknown = next((point.series for point in self.points if point.series not in self.tokens), None)
        if not self.points or unknown is not None:
            raise ValueError("no points" if unknown is None else f"tokens does not have the series {unknown!r}")
        return self


def save_result(path: Path, result: LatencyResult | TradeoffResult) -> None:
    """Write it as JSON, atomically."""
    write_json(path, result.model_dump(mode="json"))


def parse_result(path: Path, value: Mapping[str, object]) -> LatencyResult | TradeoffResult:
    """A benchmark's result, checked. DataError for another version, and names the first field that is wrong."""
    schema: type[LatencyResult | TradeoffResult] = TradeoffResult if value.get("kind") == "tradeoff" else LatencyResult
    return parse_header(value, schema, key=KEY, version=FORMAT, path=path, error=DataError)

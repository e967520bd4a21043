"""Results as a benchmark leaves them behind."""

from collections.abc import Callable
from typing import Any

import pytest

from texttok_cli.bench.machine import Machine
from texttok_cli.bench.results import LatencyResult, PointResult, Row, Target, TradeoffResult
from texttok_cli.bench.timing import spread_of

MACHINE = Machine(
    device="cpu",
    name="a processor",
    threads=1,
    cores=2,
    memory_GB=8.0,
    load=0.1,
    shared=False,
    clock="wall",
    system="Linux x86_64",
    date="2026-11-24",
    versions={"torch": "2.14"},
)


@pytest.fixture
def tradeoff_result() -> Callable[..., TradeoffResult]:
    """A sweep of two systems: (series, steps, seconds, fid) each, at one `cfg`; the first series is the reference unless said otherwise."""

    def make(*points: tuple[str, int, float, float], tokens: dict[str, int], cfg: str = "1.5", **changes: Any) -> TradeoffResult:
        found = [
            PointResult(series=name, steps=steps, sampler="ddim", cfg=cfg, seconds_per_image=seconds, fid=fid, images=8)
            for name, steps, seconds, fid in points
        ]
        whole = {
            "name": "small",
            "machine": MACHINE,
            "reference": next(iter(tokens)),
            "protocol": {"n": 8},
            "tokens": tokens,
            "points": found,
        }
        return TradeoffResult.model_validate({**whole, **changes})

    return make


@pytest.fixture
def latency_result() -> LatencyResult:
    """A measured row, one that did not fit, and a target."""
    measured = Row(
        part="encode", system="TexTok-32", image_size=256, tokens=32, batch=4, seconds=spread_of([2.0, 4.0, 6.0]), times=8, note="a | b"
    )
    skipped = Row(part="text", system="T5-XXL", batch=1, skipped="needs about 9.6 GB")
    target = Target(name="share", reached=0.8, least=0.7, note="<bf16>")
    return LatencyResult(weights="random weights", precision="bf16", machine=MACHINE, rows=[measured, skipped], targets=[target])

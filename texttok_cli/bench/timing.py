"""How long something takes: warm-up, synchronisation, the median of some runs and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from texttok_cli.config.schema import Config
from texttok_cli.errors import BackendError

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Spread(Config):
    """Seconds of several runs: their median and quartiles."""

    median: float = Field(ge=0)
    low: float = Field(ge=0)  # first quartile
    high: float = Field(ge=0)  # third quartile
    repeats: int = Field(ge=1)

    def scaled(self, factor: float) -> Spread:
        """The same runs, each `factor` times as long."""
        return Spread(median=self.median * factor, low=self.low * factor, high=self.high * factor, repeats=self.repeats)


def spread_of(seconds: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive) of the seconds of one or more runs."""
    if len(seconds) == 1:
        return Spread(median=seconds[0], low=seconds[0], high=seconds[0], repeats=1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high, repeats=len(seconds))


class Timer:
    """Times work on one device.

    `clock` wall is what a person waits. cpu is this process's time on the processor: on a machine whose cores others use too it
    hardly changes with them, and it means something only where one thread of one process does all the work.
    BackendError for cpu on another device or with several threads.
    """

    def __init__(self, device: torch.device | str = "cpu", *, warm_up: int = 1, repeats: int = 5, clock: Clock = "wall") -> None:
        self.device, self.warm_up, self.repeats, self.clock = torch.device(device), warm_up, repeats, clock
        if clock == "cpu" and (self.device.type != "cpu" or torch.get_num_threads() > 1):
            raise BackendError("--clock cpu: counts one thread's time on a CPU: set OMP_NUM_THREADS=1 and --device cpu, or use wall")

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one run, until the device has finished it."""
        self._synchronize()
        before = CLOCKS[self.clock]()
        work()
        self._synchronize()
        return CLOCKS[self.clock]() - before

    def measure(self, work: Callable[[], object], *, repeats: int | None = None) -> Spread:
        """Of `repeats` runs (None: the timer's) after the warm-up."""
        return spread_of(self.in_turns({"": work}, repeats=repeats)[""])

    def in_turns(self, works: Mapping[str, Callable[[], object]], *, repeats: int | None = None) -> dict[str, list[float]]:
        """Seconds of each work's runs, taken in turns: what else the machine does falls on all of them alike, as ratios need it."""
        for _ in range(self.warm_up):
            for work in works.values():
                work()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats or self.repeats):
            for name, work in works.items():
                seconds[name].append(self.once(work))
        return seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def median_ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Median over the turns of upper / lower: both of a turn met the same machine."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))

"""Medians and quartiles, runs in turns, clocks that mean something, and what is said of the machine."""

import time
from functools import partial

import pytest
import torch

from texttok_cli.bench import machine, timing
from texttok_cli.bench.machine import block_products, describe, products
from texttok_cli.bench.timing import Spread, Timer, median_ratio, spread_of
from texttok_cli.errors import BackendError


def test_spread_is_median_and_quartiles() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high, spread.repeats) == (2.0, 3.0, 4.0, 5)
    assert spread.scaled(10) == Spread(low=20.0, median=30.0, high=40.0, repeats=5)
    assert spread_of([7.0]).low == 7


def test_warm_up_is_run_and_not_counted_and_works_take_turns() -> None:
    calls: list[str] = []
    timer = Timer(warm_up=2, repeats=3)
    seconds = timer.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_wait_is_wall_time_and_no_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the clock of its name; how those run is not ours to test."""
    assert (timing.CLOCKS["wall"], timing.CLOCKS["cpu"]) == (time.perf_counter, time.process_time)
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 1)
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(timing, "CLOCKS", {name: partial(now.__getitem__, name) for name in now})
    wait = partial(now.__setitem__, "wall", 5.0)
    assert Timer(warm_up=0, repeats=1, clock="cpu").once(wait) == 0
    now["wall"] = 0.0
    assert Timer(warm_up=0, repeats=1, clock="wall").once(wait) == 5


def test_processor_time_of_several_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 2)
    with pytest.raises(BackendError, match="OMP_NUM_THREADS=1"):
        Timer(clock="cpu")


def test_a_ratio_is_taken_turn_by_turn() -> None:
    """A machine that slows down by 10 in the middle changes no ratio."""
    assert median_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
    assert median_ratio([2.0, 90.0, 2.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0]) == 2.0  # nor does one bad turn


def test_products_have_the_flops_of_a_block() -> None:
    shapes = block_products(8, 16)
    work, flops = products(shapes, torch.float32, torch.device("cpu"))
    work()
    assert flops == 2 * 8 * 12 * 16 * 16  # 12 D^2 a token


@pytest.mark.parametrize(("load", "shared"), [(0.1, False), (2.0, True)])
def test_the_machine_is_shared_if_others_computed_before(load: float, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    found = describe(torch.device("cpu"), clock="wall")
    assert (found.load, found.shared, found.device) == (load, shared, "cpu")
    assert found.versions["torch"].startswith(torch.__version__.partition("+")[0])
    assert found.memory_GB > 0.5

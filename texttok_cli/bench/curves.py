"""The arithmetic of speed/quality curves, as the paper has it: relative gains, Pareto fronts, speed-up at equal FID, gain at equal time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Point:
    """A setting of a system: seconds an image and FID (of both, less is better)."""

    name: str
    seconds: float
    fid: float


def gain(before: float, after: float) -> float:
    """Relative improvement of a number that should be small, in percent (Sec. 4.3)."""
    return 100 * (before - after) / before


def gains(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    """The gain for every number of tokens that both have."""
    return {tokens: gain(before[tokens], after[tokens]) for tokens in sorted(before.keys() & after.keys())}


def mean_gain(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Mean of the gains over numbers of tokens, each counted once. ValueError if there is none that both have."""
    return fmean(gains(before, after).values())


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points than which no other is both as fast and as good, the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.fid)):
        if not front or point.fid < front[-1].fid:
            front.append(point)
    return front


@dataclass(frozen=True, slots=True)
class Comparison:
    """A setting of the reference, the setting of the others that is set against it, and their ratio or gain."""

    reference: Point
    chosen: Point
    value: float


def best(points: Sequence[Point]) -> Point:
    """The point of least FID; of equal ones the fastest."""
    return min(points, key=lambda p: (p.fid, p.seconds))


def speedup_at_equal_fid(points: Iterable[Point], reference: Point) -> Comparison | None:
    """How many times faster than `reference` the fastest setting is whose FID is no worse; None if there is none."""
    good = [point for point in points if point.fid <= reference.fid]
    if not good:
        return None
    chosen = min(good, key=lambda p: (p.seconds, p.fid))
    return Comparison(reference, chosen, reference.seconds / chosen.seconds)


def gain_at_equal_time(points: Iterable[Point], reference: Point) -> Comparison | None:
    """By how many percent the best setting that takes no longer than `reference` has the lower FID; None if there is none."""
    fast = [point for point in points if point.seconds <= reference.seconds]
    if not fast:
        return None
    chosen = best(fast)
    return Comparison(reference, chosen, gain(reference.fid, chosen.fid))

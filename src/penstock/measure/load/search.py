"""Which loads to try next: points of a sweep up to saturation, and the highest rate within limits.

Knows neither requests nor servers: `measure` runs a stage and returns its figures. Returns only
what was measured: no capacity is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

MIN_RISE = 1.03  # of throughput from one point to the next; less is none
NUM_FLAT = 2  # points in a row without a rise, after which a sweep ends
FACTOR = 2.0


class Point(NamedTuple):
    """A load: a rate in requests a second (open loop), or a number of clients (closed loop)."""

    rate: float | None = None
    concurrency: int | None = None

    @property
    def stage(self) -> str:
        return f"rate={self.rate:g}" if self.rate is not None else f"concurrency={self.concurrency}"


Measure = Callable[[Point], Awaitable[Mapping[str, Any]]]  # figures of a stage


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A rate, and what it came to."""

    rate: float
    passed: bool
    why: str = ""  # it did not


class Found(msgspec.Struct, kw_only=True):
    """The bracket at the end of a search. `ended` says why it went no further."""

    highest_passing: float | None
    lowest_failing: float | None
    ended: str
    tried: list[Tried]


def clients_up_to(most: int) -> list[Point]:
    """1, 2, 4, ... clients, and `most`."""
    numbers = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [Point(concurrency=number) for number in [*numbers, most]]


async def sweep(points: Iterable[Point], measure: Measure) -> str:
    """Measure one point after another. Returns why it ended.

    Ends early where a stage is saturated (in open loop), or throughput, goodput if there are limits
    on requests, has twice not risen.
    """
    best, num_flat = 0.0, 0
    for point in points:
        stage = await measure(point)
        throughput = _throughput(stage)
        num_flat = 0 if throughput > best * MIN_RISE else num_flat + 1
        best = max(best, throughput)
        if point.rate is not None and stage["trends"]["saturated"]:
            return f"{point.stage} is saturated: requests in flight and their waits grew"
        if num_flat == NUM_FLAT:
            return f"throughput has not risen in {NUM_FLAT} points up to {point.stage}"
    return "all points were measured"


def _throughput(stage: Mapping[str, Any]) -> float:
    if stage["goodput"] is not None:
        return stage["goodput"]["per_s"] or 0.0
    return stage["tokens"]["output_per_s"] or stage["rate"]["answered_per_s"] or 0.0


def verdict(stage: Mapping[str, Any]) -> str:
    """Why a stage does not keep its limits; empty: it does."""
    broken = [judged["limit"] for judged in stage["slo"] if not judged["kept"]]
    if stage["trends"]["saturated"]:
        broken.append("saturated")
    if not stage["requests"]["num_ok"]:
        broken.append("nothing was answered")
    return ", ".join(broken)


async def highest_rate(
    measure: Measure,
    *,
    start: float,
    most: float = math.inf,
    precision: float = 0.05,
    num_stages: int = 16,
) -> Found:
    """Double or halve the rate until the limits hold on one side only, then halve the bracket.

    The idea of MLPerf's server scenario and AIPerf's search. A rate is judged once.

    Args:
        start: the rate tried first, in requests a second.
        most: no higher rate is tried.
        precision: ends when the failing rate is at most this share above the passing one.
        num_stages: ends after so many.
    """
    found = Found(highest_passing=None, lowest_failing=None, ended="", tried=[])
    rate = min(start, most)
    for _ in range(num_stages):
        stage = await measure(Point(rate=rate))
        why = verdict(stage)
        found.tried.append(Tried(rate=rate, passed=not why, why=why))
        if why:
            found.lowest_failing = rate
        else:
            found.highest_passing = rate
        if not why and stage["problems"]:
            found.ended = f"the client could not do more: {stage['problems'][0]}"
            return found
        if not why and rate >= most:
            found.ended = f"the highest rate that was allowed, {most:g}, passes"
            return found
        low, high = found.highest_passing, found.lowest_failing
        if low is not None and high is not None:
            if high <= low * (1 + precision):
                found.ended = f"the bracket is within {precision:.0%}"
                return found
            rate = float(f"{math.sqrt(low * high):.3g}")
        elif low is not None:
            rate = min(most, float(f"{rate * FACTOR:.3g}"))
        else:
            rate = float(f"{rate / FACTOR:.3g}")
        if rate in (low, high):
            found.ended = "the bracket is as narrow as rates are written"
            return found
    found.ended = f"{num_stages} stages were measured"
    return found

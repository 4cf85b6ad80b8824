"""When requests are due: seconds from the begin of a stage, made before it and never changed.

Knows no request. A schedule is what its seed says: it is never stretched so that its mean comes out
at the rate that was asked for; how many a second were due and were sent is told beside it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from penstock.errors import ConfigError


class Segment(NamedTuple):
    """A time in which the rate goes linearly from one value to another, in requests a second."""

    duration_s: float
    begin_per_s: float
    end_per_s: float


def steady(rate_per_s: float, *, ramp_s: float = 0.0) -> list[Segment]:
    """A rate that is reached from 0 in `ramp_s` seconds and then never ends."""
    ramp = [Segment(ramp_s, 0.0, rate_per_s)] if ramp_s > 0 else []
    return [*ramp, Segment(math.inf, rate_per_s, rate_per_s)]


def parse_rates(text: str) -> list[Segment]:
    """Read `30@2,10@2-8,60@8`: 30 s at 2 requests a second, 10 s from 2 to 8, 60 s at 8.

    Raises:
        ConfigError: a part of it is something else.
    """
    segments = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\d.]+)(?:s)?@([\d.]+)(?:-([\d.]+))?\s*", part)
        try:
            if match is None:
                raise ValueError
            duration_s, begin, end = (float(match[i] or match[2]) for i in (1, 2, 3))
        except ValueError:
            duration_s = begin = end = 0.0
        if duration_s <= 0 or begin + end <= 0:
            raise ConfigError(
                f"`{part.strip()}` in `--rate-schedule` is no time at a rate.",
                hint="such as `30@2,10@2-8,60@8`: seconds, @, requests a second",
            )
        segments.append(Segment(duration_s, begin, end))
    return segments


def due_times(
    rates: Sequence[Segment],
    *,
    seed: int,
    burstiness: float = 1.0,
    num: int | None = None,
    duration_s: float = math.inf,
) -> list[float]:
    """Due times in seconds, ascending: the first `num` of those before `duration_s`.

    The times between requests are gamma distributed with shape `burstiness`: 1 is a Poisson
    process, less is burstier (coefficient of variation 1/sqrt(burstiness)), infinity is a constant
    rate. Where the rate changes, time is stretched so that the expected number follows it.
    """
    whole_s = min(duration_s, math.fsum(part.duration_s for part in rates))
    assert num is not None or math.isfinite(whole_s)
    if math.isinf(rates[-1].end_per_s):
        return [0.0] * (num or 0)
    times: list[float] = []
    for amount in _amounts(burstiness, seed):
        time_s = _when(rates, amount)
        if time_s is None or time_s >= duration_s or (num is not None and len(times) >= num):
            break
        times.append(time_s)
    return times


def _amounts(burstiness: float, seed: int) -> Iterator[float]:
    """The expected number of requests before each of them, if the rate were 1."""
    if math.isinf(burstiness):
        yield from map(float, range(2**53))
    chance = random.Random(f"{seed}/arrivals")
    amount = 0.0
    while True:
        amount += chance.gammavariate(burstiness, 1 / burstiness)
        yield amount


def _when(rates: Sequence[Segment], amount: float) -> float | None:
    """When the expected number of requests reaches `amount`; None: never."""
    begin_s = 0.0
    for duration_s, first, last in rates:
        whole = first if math.isinf(duration_s) else duration_s * (first + last) / 2
        if math.isinf(duration_s) or amount < whole:
            slope = 0.0 if math.isinf(duration_s) else (last - first) / duration_s
            # amount = first t + slope t^2 / 2, in the form that also holds for slope 0
            root = math.sqrt(max(0.0, first * first + 2 * slope * amount))
            return begin_s + (2 * amount / (first + root) if amount else 0.0)
        begin_s += duration_s
        amount -= whole
    return None


def replayed(
    offsets_s: Sequence[float], *, time_scale: float = 1.0, duration_s: float = math.inf
) -> list[float]:
    """The offsets of a trace, `time_scale` times as slow (0.5: twice the load), up to a time."""
    return list(
        takewhile(lambda time_s: time_s < duration_s, (at_s * time_scale for at_s in offsets_s))
    )

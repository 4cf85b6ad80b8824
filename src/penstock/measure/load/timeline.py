"""What went on over time: tokens by the moment they came, requests in flight, and trends of both.

Pure functions of rows; times are nanoseconds on the clock of the run. Tokens belong to the moment
of their chunk, so how a server packs them changes no rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

from penstock.measure.records import Request

NUM_BINS = 12  # of a window, for trends: neighbours within a bin depend on one another
# Bins of a busy queue depend on one another more than the t test knows, so these are strict: of
# windows of 30 s of a queue that is 80 % busy, one in 20 is called saturated, and not one in 5 (as
# with p < 0.05 and growth 0.25); at 120 %, nine in ten. A queue that fills from empty grows by 1.8.
MAX_P = 0.01
MIN_GROWTH = 1.0  # of the mean, over the window


class Window(NamedTuple):
    """A time from `begin_ns` up to `end_ns`."""

    begin_ns: int
    end_ns: int

    @property
    def duration_s(self) -> float:
        return max(0, self.end_ns - self.begin_ns) / 1e9

    def holds(self, at_ns: int | None) -> bool:
        return at_ns is not None and self.begin_ns <= at_ns < self.end_ns


def known_out(row: Request) -> int | None:
    """Tokens of an answer; None where nobody counted them, but its chunks were."""
    return row.n_out if row.count_source in ("usage", "tokenizer") else None


def output_tokens(row: Request) -> Iterator[tuple[int, float]]:
    """(time, tokens) of each chunk.

    Where nobody said how many tokens a chunk has, those of the answer are spread evenly over its
    chunks; an answer that came whole is one chunk. A sum that differs from the server's count is
    scaled to it.
    """
    times = row.chunk_t_ns
    num_out = known_out(row)
    if not times:
        at_ns = row.t_last_ns if row.t_last_ns is not None else row.t_done_ns
        if at_ns is not None and num_out:
            yield at_ns, float(num_out)
        return
    counted = sum(row.chunk_n)
    if len(row.chunk_n) != len(times) or not counted:
        if num_out:
            yield from ((at_ns, num_out / len(times)) for at_ns in times)
        return
    scale = num_out / counted if num_out else 1.0
    yield from ((at_ns, num * scale) for at_ns, num in zip(times, row.chunk_n, strict=True))


def output_in(rows: Iterable[Request], window: Window) -> float:
    """Output tokens that came within the window, of answers and of what was cut short."""
    return math.fsum(
        num
        for row in rows
        if row.error_class in (None, "cut")
        for at_ns, num in output_tokens(row)
        if window.holds(at_ns)
    )


def input_in(rows: Iterable[Request], window: Window) -> int:
    """Prompt tokens whose first answer token came within the window."""
    return sum(
        row.n_in or 0
        for row in rows
        if row.error_class in (None, "cut")
        and window.holds(row.t_done_ns if row.t_first_ns is None else row.t_first_ns)
    )


def in_flight(rows: Iterable[Request]) -> list[tuple[int, int]]:
    """(time, requests in flight from then on), at each sending and each end."""
    events: list[tuple[int, int]] = []
    for row in rows:
        if row.t_sent_ns is not None and row.t_done_ns is not None:
            events += [(row.t_sent_ns, 1), (row.t_done_ns, -1)]
    steps: list[tuple[int, int]] = []
    number = 0
    for at_ns, change in sorted(events):
        number += change
        if steps and steps[-1][0] == at_ns:
            steps[-1] = (at_ns, number)
        else:
            steps.append((at_ns, number))
    return steps


def means_in_flight(steps: Sequence[tuple[int, int]], edges_ns: Sequence[int]) -> list[float]:
    """Mean number in flight between each two edges, weighted by time."""
    means = []
    place, number = 0, 0
    for begin_ns, end_ns in pairwise(edges_ns):
        area, at_ns = 0, begin_ns
        while place < len(steps) and steps[place][0] < end_ns:
            step_ns = max(begin_ns, steps[place][0])
            area += number * (step_ns - at_ns)
            at_ns, number = step_ns, steps[place][1]
            place += 1
        area += number * (end_ns - at_ns)
        means.append(area / max(1, end_ns - begin_ns))
    return means


def edges_of(window: Window, num_bins: int) -> list[int]:
    """Begin and end of equal parts of a window."""
    span_ns = window.end_ns - window.begin_ns
    return [window.begin_ns + span_ns * index // num_bins for index in range(num_bins + 1)]


class Trend(NamedTuple):
    """A straight line through the means of bins, fitted by least squares."""

    growth: float  # from the begin of the window to its end, as a share of the mean
    p_value: float  # of a slope this steep or steeper, were there none (t test, one side)

    @property
    def rises(self) -> bool:
        return self.p_value < MAX_P and self.growth > MIN_GROWTH


def trend(values: Sequence[float | None]) -> Trend | None:
    """The trend of values at equal distances; None: fewer than 5 are there, or all are 0."""
    points = [(place, value) for place, value in enumerate(values) if value is not None]
    if len(points) < 5:
        return None
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    if mean_y <= 0:
        return None
    square = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / square
    rest = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    freedom = len(points) - 2
    error = math.sqrt(rest / freedom / square)
    growth = slope * (len(values) - 1) / mean_y
    if error == 0:
        return Trend(growth, 0.0 if slope > 0 else 1.0)
    return Trend(growth, _upper_tail(slope / error, freedom))


def _upper_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution, by Wallace's normal approximation (1959)."""
    z = math.sqrt(freedom * math.log1p(t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return 1 - NormalDist().cdf(math.copysign(z, t))

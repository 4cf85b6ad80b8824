"""Values of meters over time, and the phases that were marked: what energy and memory are made of.

Pure. Between readings a value is taken as linear, so a counter's step over a window is exact only
where a reading was taken at both ends (`Sampler.phase` does).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from penstock.measure.records import Mark, Record, Sample

MIN_COVERED = 0.95  # of a window, by readings
Points = list[tuple[int, float]]  # time in ns, value


class Interval(msgspec.Struct, kw_only=True):
    """A phase that was marked."""

    name: str
    arm: str
    stage: str
    begin_ns: int
    end_ns: int

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.begin_ns) * 1e-9


def phases(records: Sequence[Record]) -> list[Interval]:
    """The phases that `Sampler.phase` marked, whole ones only, by the time of their end."""
    begun: dict[tuple[str, str, str], int] = {}
    found = []
    for mark in records:
        if not isinstance(mark, Mark):
            continue
        name, dot, edge = mark.name.rpartition(".")
        key = (name, mark.arm, mark.stage)
        if dot and edge == "begin":
            begun[key] = mark.t_ns
        elif dot and edge == "end" and key in begun:
            found.append(
                Interval(
                    name=name,
                    arm=mark.arm,
                    stage=mark.stage,
                    begin_ns=begun.pop(key),
                    end_ns=mark.t_ns,
                )
            )
    return found


class Series:
    """Values over time, by source, arm and name."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._points: dict[tuple[str, str, str], Points] = {}
        for one in records:
            if isinstance(one, Sample):
                for name, value in one.values.items():
                    key = (one.source, one.arm, name)
                    self._points.setdefault(key, []).append((one.t_ns, value))
        for points in self._points.values():
            points.sort()

    def names(self, source: str, arm: str = "") -> list[str]:
        return sorted(name for kind, who, name in self._points if (kind, who) == (source, arm))

    def get(self, source: str, arm: str, name: str) -> Points:
        return self._points.get((source, arm, name), [])

    def step(self, source: str, arm: str, name: str, window: Interval) -> float | None:
        """How far a counter went in a window; None: readings do not cover it."""
        points = self.get(source, arm, name)
        if not _covers(points, window):
            return None
        return _at(points, window.end_ns) - _at(points, window.begin_ns)

    def integral(self, source: str, arm: str, name: str, window: Interval) -> float | None:
        """Integral of a value over a window's seconds, linear between readings; or None."""
        points = self.get(source, arm, name)
        if not _covers(points, window):
            return None
        begin_ns = max(window.begin_ns, points[0][0])
        end_ns = min(window.end_ns, points[-1][0])
        inner = [one for one in points if begin_ns < one[0] < end_ns]
        path = [(begin_ns, _at(points, begin_ns)), *inner, (end_ns, _at(points, end_ns))]
        return sum(
            (right[0] - left[0]) * 1e-9 * (left[1] + right[1]) / 2 for left, right in pairwise(path)
        )


def _covers(points: Points, window: Interval) -> bool:
    if len(points) < 2 or window.end_ns <= window.begin_ns:
        return False
    covered_ns = min(window.end_ns, points[-1][0]) - max(window.begin_ns, points[0][0])
    return covered_ns >= MIN_COVERED * (window.end_ns - window.begin_ns)


def _at(points: Points, t_ns: int) -> float:
    """The value at a time, linear between readings, constant beyond the first and the last."""
    place = bisect.bisect_left(points, (t_ns, float("-inf")))
    if place == len(points):
        return points[-1][1]
    if place == 0 or points[place][0] == t_ns:
        return points[place][1]
    (left_ns, left), (right_ns, right) = points[place - 1], points[place]
    return left + (right - left) * (t_ns - left_ns) / (right_ns - left_ns)

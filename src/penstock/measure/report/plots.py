"""Plots of a page as inline SVG: every one with its numbers as a table behind it, and with n.

A plot is an `Html` figure: title, legend, drawing, note, table. Values are in the unit of their
axis; those that an axis cannot show are left out and counted in the note. Knows nothing of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from penstock.measure.metrics import is_supported, quantile
from penstock.measure.report.axes import Axis, linear_ticks, width_px
from penstock.measure.report.drawing import (
    BOTTOM,
    TOP,
    WIDTH,
    Frame,
    colour,
    dash,
    figure,
    legend,
    marker,
    nothing,
    path,
    steps,
    text,
    whisker,
)
from penstock.measure.report.html import Html, element
from penstock.measure.report.rows import Bar, Effect, bars, forest
from penstock.measure.report.scatter import Better, Point, pareto, scatter
from penstock.measure.report.tables import Column, Marked, table
from penstock.measure.report.units import quantity

TIME: Final = Axis("time", "s")
SHARE: Final = Axis("share", "%", low=0.0, high=1.0)
_MOST_ROWS: Final = 200  # of a table behind a plot
_CURVE_POINTS: Final = 400


class Series(NamedTuple):
    """Points of a line, in the order in which they are joined; a y of None is a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]
    intervals: Sequence[tuple[float, float] | None] = ()  # of y, one for each point, or none at all


def ecdf(
    samples: Mapping[str, Sequence[float]],
    axis: Axis,
    *,
    title: str,
    note: str = "",
    limit: float | None = None,
) -> Html:
    """Share of the values at or below each value, one curve of steps a sample; `limit`: an SLO."""
    shown = {name: _shown(axis, values) for name, values in samples.items()}
    every = [value for values in shown.values() for value in values]
    if not every:
        return nothing(title, "no value is there")
    frame = Frame(axis, SHARE, [*every, *_listed(limit)], [0, 1])
    shapes = frame.limit_x(limit, axis.unit)
    for index, values in enumerate(shown.values()):
        if values:
            curve = [(frame.x(x), frame.y(y)) for x, y in _curve(sorted(values))]
            shapes.append(steps(curve, colour(index), "stroke", dash(index)))
    names = [f"{name} (n = {len(shown[name]):,})".strip() for name in samples]
    return figure(
        title,
        frame.draw(shapes, title=title, description=f"Distribution of {', '.join(names)}."),
        note=_told(note, _left_out(axis, samples.values())),
        names=legend(names),
        table=_quantiles(shown, axis),
    )


def histogram(
    values: Sequence[float],
    axis: Axis,
    *,
    title: str,
    note: str = "",
    limit: float | None = None,
) -> Html:
    """How many values lie in each of about 20 bins, whose width is 1, 2 or 5 times a power of 10.

    On an axis of logarithms, bins are fifths of a decade.
    """
    shown = _shown(axis, values)
    if not shown:
        return nothing(title, "no value is there")
    edges = _edges(axis, min(shown), max(shown))
    counts = [0] * (len(edges) - 1)
    place = 0
    for value in sorted(shown):
        while place < len(counts) - 1 and value >= edges[place + 1]:
            place += 1
        counts[place] += 1
    frame = Frame(axis, Axis("count"), [edges[0], edges[-1]], counts, zero_y=True)
    shapes = []
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        left, right, top = frame.x(low), frame.x(high), frame.y(count)
        told = f"{quantity(low, axis.unit)} to {quantity(high, axis.unit)}: {count:,}"
        shapes.append(
            element(
                "rect",
                element("title", told),
                class_="c0 fill",
                x=left,
                y=top,
                width=round(max(right - left - 1, 0.5), 2),
                height=round(frame.height - BOTTOM - top, 2),
            )
        )
    rows = [[low, high, count] for (low, high), count in zip(pairwise(edges), counts, strict=True)]
    return figure(
        title,
        frame.draw(
            [*shapes, *frame.limit_x(limit, axis.unit)],
            title=title,
            description=f"Histogram of {len(shown)} values.",
        ),
        note=_told(f"n = {len(shown):,}. {note}".strip(), _left_out(axis, [values])),
        table=table([Column("from", axis.unit), Column("below", axis.unit), "count"], rows),
    )


def timeline(
    series: Sequence[Series],
    y: Axis,
    *,
    title: str,
    x: Axis = TIME,
    note: str = "",
    marks: Sequence[tuple[float, str]] = (),
) -> Html:
    """Values over time as lines; `marks` are moments with a name, such as the begin of a phase."""
    xs, ys = _places(series, x, y)
    if not ys:
        return nothing(title, "no value is there")
    frame = Frame(x, y, [*xs, *(at for at, _ in marks)], ys)
    shapes = _marks(frame, marks)
    for index, one in enumerate(series):
        for run in _unbroken(one.points, frame):
            if len(run) == 1:
                shapes.append(marker(index, *run[0], size=2.5))
            else:
                shapes.append(path(_thinned(run), colour(index), "stroke", dash(index)))
    names = [one.name for one in series]
    return figure(
        title,
        frame.draw(shapes, title=title, description=f"Over time: {', '.join(names)}."),
        note=note,
        names=legend(names),
        table=_points_table(series, x, y),
    )


def line(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    title: str,
    note: str = "",
    limit: float | None = None,
) -> Html:
    """Lines with a mark at each measured point, and whiskers where there are intervals."""
    xs, ys = _places(series, x, y)
    if not ys:
        return nothing(title, "no value is there")
    frame = Frame(x, y, xs, [*ys, *_listed(limit)])
    shapes = frame.limit_y(limit, y.unit)
    for index, one in enumerate(series):
        for run in _unbroken(one.points, frame):
            if len(run) > 1:
                shapes.append(path(run, colour(index), "stroke", dash(index)))
        for (at, value), ends in zip(one.points, _intervals(one), strict=True):
            if value is None or not frame.x.axis.fits(at) or not frame.y.axis.fits(value):
                continue
            if ends is not None:
                shapes.append(
                    whisker(frame.x(at), frame.y(ends[0]), frame.x(at), frame.y(ends[1]), index)
                )
            told = f"{one.name}: {quantity(at, x.unit)}, {quantity(value, y.unit)}"
            shapes.append(marker(index, frame.x(at), frame.y(value), title=told))
    names = [one.name for one in series]
    return figure(
        title,
        frame.draw(shapes, title=title, description=f"Lines: {', '.join(names)}."),
        note=note,
        names=legend(names, marks=True),
        table=_points_table(series, x, y),
    )


def _marks(frame: Frame, marks: Sequence[tuple[float, str]]) -> list[Html]:
    """Upright lines; a name that would cover its neighbour's is only there on hover."""
    shapes, edge = [], width_px(frame.y.title) + 16
    for at, name in sorted(marks):
        x = frame.x(at)
        rule = element(
            "line",
            element("title", f"{name}: {quantity(at, 's')}"),
            class_="axis dash2",
            x1=x,
            y1=TOP - 8,
            x2=x,
            y2=frame.height - BOTTOM,
        )
        shapes.append(rule)
        if x > edge and x + 4 + width_px(name) <= WIDTH:
            shapes.append(text(x + 4, TOP - 14, name, soft=True))
            edge = x + 12 + width_px(name)
    return shapes


def _places(series: Sequence[Series], x: Axis, y: Axis) -> tuple[list[float], list[float]]:
    """All x and all y that can be shown, ends of intervals among them."""
    xs, ys = [], []
    for one in series:
        for (at, value), ends in zip(one.points, _intervals(one), strict=True):
            if value is not None and x.fits(at) and y.fits(value):
                xs.append(at)
                ys += [value, *(ends or ())]
    return xs, ys


def _intervals(series: Series) -> Sequence[tuple[float, float] | None]:
    return series.intervals or [None] * len(series.points)


def _unbroken(
    points: Sequence[tuple[float, float | None]], frame: Frame
) -> Iterable[list[tuple[float, float]]]:
    """Pixels of the runs of points between gaps."""
    run: list[tuple[float, float]] = []
    for at, value in points:
        if value is None or not frame.x.axis.fits(at) or not frame.y.axis.fits(value):
            if run:
                yield run
            run = []
        else:
            run.append((frame.x(at), frame.y(value)))
    if run:
        yield run


def _thinned(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """No more than four points a pixel's width, the highest and lowest among them."""
    if len(run) <= 2 * _CURVE_POINTS:
        return run
    kept: list[tuple[float, float]] = []
    bucket: list[tuple[float, float]] = []

    def empty() -> None:
        ends = {0, len(bucket) - 1}
        ends |= {bucket.index(pick(bucket, key=lambda point: point[1])) for pick in (min, max)}
        kept.extend(bucket[place] for place in sorted(ends))

    for point in run:
        if bucket and int(point[0]) != int(bucket[0][0]):
            empty()
            bucket = []
        bucket.append(point)
    empty()
    return kept


def _curve(ordered: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of the curve of steps; of many values, evenly chosen ones and the upper tail."""
    count = len(ordered)
    chosen = range(count)
    places = set(chosen)
    if count > _CURVE_POINTS:
        places = set(chosen[:: math.ceil(count / _CURVE_POINTS)]) | set(chosen[-50:])
    corners = [(ordered[0], 0.0)]
    corners += [(ordered[place], (place + 1) / count) for place in sorted(places)]
    return corners


def _edges(axis: Axis, low: float, high: float) -> list[float]:
    if axis.log:
        first, last = math.floor(5 * math.log10(low)), math.floor(5 * math.log10(high)) + 1
        return [10 ** (power / 5) for power in range(first, last + 1)]
    if low == high:
        spread = abs(low) / 10 or 0.5
        return [low - spread, low + spread]
    ticks, _ = linear_ticks(low, high, num_ticks=20)
    if high >= ticks[-1]:
        ticks.append(ticks[-1] + (ticks[1] - ticks[0]))
    return ticks


def _quantiles(samples: Mapping[str, Sequence[float]], axis: Axis) -> Html:
    marks = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
    rows = []
    for name, values in samples.items():
        cells: list[object] = [name or "all", len(values)]
        for mark, q in marks.items():
            value = quantile(values, q) if values else None
            weak = value is not None and mark[0] == "p" and not is_supported(len(values), q)
            cells.append(Marked(value, "fewer than 10 values lie beyond it") if weak else value)
        rows.append(cells)
    return table(["", "n", *(Column(mark, axis.unit) for mark in marks)], rows)


def _points_table(series: Sequence[Series], x: Axis, y: Axis) -> Html:
    """Points of all series; of very many, evenly chosen ones."""
    rows = []
    with_intervals = any(one.intervals for one in series)
    for one in series:
        for (at, value), ends in zip(one.points, _intervals(one), strict=True):
            rows.append([one.name, at, value, *((ends or (None, None)) if with_intervals else ())])
    every = math.ceil(len(rows) / _MOST_ROWS) or 1
    caption = f"One of {every} points; all are in the records." if every > 1 else ""
    head: list[Column | str] = ["", Column(x.title, x.unit), Column(y.title, y.unit)]
    if with_intervals:
        head += [Column("low", y.unit), Column("high", y.unit)]
    return table(head, rows[::every], caption=caption)


def _shown(axis: Axis, values: Sequence[float]) -> list[float]:
    return [value for value in values if axis.fits(value)]


def _left_out(axis: Axis, samples: Iterable[Sequence[float]]) -> str:
    count = sum(not axis.fits(value) for values in samples for value in values)
    return f"{count:,} values that a log axis cannot show are left out." if count else ""


def _listed(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _told(*notes: str) -> str:
    return " ".join(note for note in notes if note)


__all__ = [
    "SHARE",
    "TIME",
    "Axis",
    "Bar",
    "Better",
    "Effect",
    "Point",
    "Series",
    "bars",
    "ecdf",
    "forest",
    "histogram",
    "line",
    "pareto",
    "scatter",
    "timeline",
]

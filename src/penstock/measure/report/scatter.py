"""Points in two measures, their names, and the Pareto front as steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from penstock.measure.report.axes import Axis, shorten, width_px
from penstock.measure.report.drawing import (
    BOTTOM,
    TOP,
    WIDTH,
    Frame,
    figure,
    legend,
    marker,
    nothing,
    steps,
    text,
    whisker,
)
from penstock.measure.report.html import Html
from penstock.measure.report.tables import Column, table
from penstock.measure.report.units import quantity

Better = Literal["low", "high"]


class Point(NamedTuple):
    """A thing in a scatter plot."""

    x: float
    y: float
    label: str
    series: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


def scatter(
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    title: str,
    note: str = "",
    better: tuple[Better, Better] | None = None,
) -> Html:
    """Labelled points.

    Args:
        better: what is better of x and of y. The Pareto front is then drawn, as steps: between two
            measured points, only the worse of the two is known to be had.
    """
    shown = [point for point in points if x.fits(point.x) and y.fits(point.y)]
    if not shown:
        return nothing(title, "no point is there")
    frame = Frame(
        x,
        y,
        [value for point in shown for value in (point.x, *(point.x_interval or ()))],
        [value for point in shown for value in (point.y, *(point.y_interval or ()))],
    )
    front = pareto([(point.x, point.y) for point in shown], better) if better else []
    curve = _front(frame, [shown[index] for index in front], better) if better else []
    shapes = [steps(curve, "c6", "stroke")] if curve else []
    names = list(dict.fromkeys(point.series for point in shown))
    for point in shown:
        index, (at_x, at_y) = names.index(point.series), (frame.x(point.x), frame.y(point.y))
        if point.x_interval:
            shapes.append(whisker(*_level(frame, point), index))
        if point.y_interval:
            low, high = (frame.y(end) for end in point.y_interval)
            shapes.append(whisker(at_x, low, at_x, high, index))
        told = f"{point.label}: {quantity(point.x, x.unit)}, {quantity(point.y, y.unit)}"
        shapes.append(marker(index, at_x, at_y, title=told, size=5))
    shapes += _labels(frame, shown, curve)
    head: list[Column | str] = ["", "series", Column(x.title, x.unit), Column(y.title, y.unit)]
    rows = [[point.label, point.series, point.x, point.y] for point in shown]
    if better:
        head.append("on the front")
        rows = [[*row, "yes" if index in front else "no"] for index, row in enumerate(rows)]
        note = f"Steps: the Pareto front; better is {_corner(better)}. {note}".strip()
    return figure(
        title,
        frame.draw(shapes, title=title, description=f"{len(shown)} points."),
        note=note,
        names=legend(names, lines=False) if len(names) > 1 else None,
        table=table(head, rows),
    )


def pareto(points: Sequence[tuple[float, float]], better: tuple[Better, Better]) -> list[int]:
    """Places of the points that no other equals or beats in both and beats in one, best x first."""
    signs = [1 if side == "low" else -1 for side in better]
    order = sorted(
        range(len(points)), key=lambda at: (signs[0] * points[at][0], signs[1] * points[at][1])
    )
    front: list[int] = []
    for at in order:
        best = points[front[-1]] if front else None
        if best is None or points[at] == best or signs[1] * (points[at][1] - best[1]) < 0:
            front.append(at)
    return front


def _front(
    frame: Frame, front: Sequence[Point], better: tuple[Better, Better]
) -> list[tuple[float, float]]:
    """Pixels from the point with the best x to the edge where x is worst."""
    curve = [(frame.x(point.x), frame.y(point.y)) for point in front]
    return [*curve, (frame.right if better[0] == "low" else frame.left, curve[-1][1])]


def _corner(better: tuple[Better, Better]) -> str:
    x, y = better
    return f"{'left' if x == 'low' else 'right'} and {'down' if y == 'low' else 'up'}"


def _level(frame: Frame, point: Point) -> tuple[float, float, float, float]:
    assert point.x_interval is not None
    y = frame.y(point.y)
    return frame.x(point.x_interval[0]), y, frame.x(point.x_interval[1]), y


def _taken(
    frame: Frame, points: Sequence[Point], curve: Sequence[tuple[float, float]]
) -> list[tuple[float, float, float, float]]:
    """Boxes of what names must not cover: points, their intervals, the steps of the front."""
    boxes = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        boxes.append((x - 6, y - 6, x + 6, y + 6))
        if point.x_interval:
            boxes.append((frame.x(point.x_interval[0]), y - 3, frame.x(point.x_interval[1]), y + 3))
        if point.y_interval:
            boxes.append((x - 3, frame.y(point.y_interval[1]), x + 3, frame.y(point.y_interval[0])))
    for (x1, y1), (x2, y2) in pairwise(curve):
        boxes.append((min(x1, x2), y1 - 1, max(x1, x2), y1 + 1))
        boxes.append((x2 - 1, min(y1, y2), x2 + 1, max(y1, y2)))
    return boxes


def _labels(
    frame: Frame, points: Sequence[Point], curve: Sequence[tuple[float, float]]
) -> list[Html]:
    """Names beside their points where there is room; the others are in the table and on hover."""
    taken = _taken(frame, points, curve)
    made = []
    for point in points:
        told = shorten(point.label, 190)
        x, y, width = frame.x(point.x), frame.y(point.y), width_px(told)
        for left, base in (
            (x + 9, y + 4),
            (x - 9 - width, y + 4),
            (x - width / 2, y - 10),
            (x - width / 2, y + 19),
            (x + 9, y + 17),
            (x + 9, y - 7),
            (x - 9 - width, y + 17),
            (x - 9 - width, y - 7),
        ):
            box = (left, base - 11, left + width, base + 3)
            inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= TOP - 12
            inside = inside and box[3] <= frame.height - BOTTOM
            if told and inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                made.append(text(left, base, told))
                break
    return made


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

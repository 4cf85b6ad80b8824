"""What all plots are made of: a frame with axes, shapes, a legend, and the figure around it.

Knows pixels and markup, nothing of samples. Coordinates are of a drawing 720 units wide, which the
page scales. Legends are HTML outside of the drawing, so that they cover nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from penstock.measure.report.axes import Axis, Scale, width_px
from penstock.measure.report.html import Html, element, join
from penstock.measure.report.units import quantity

WIDTH: Final = 720.0
TOP: Final = 30.0
BOTTOM: Final = 46.0
_SHAPES: Final = 5
_CROSS: Final[list[tuple[float, float]]] = [
    *((-1.2, -0.7), (-0.7, -1.2), (0, -0.5), (0.7, -1.2), (1.2, -0.7), (0.5, 0)),
    *((1.2, 0.7), (0.7, 1.2), (0, 0.5), (-0.7, 1.2), (-1.2, 0.7), (-0.5, 0)),
]


def colour(index: int) -> str:
    """Class of a series by its place: colour by the place."""
    return f"c{index % 8}"


def dash(index: int) -> str:
    """Class of a series' line: dashes differ where colours may be mixed up."""
    return f"dash{(index + index // 8) % 4}"


def marker(index: int, x: float, y: float, *, title: str | None = None, size: float = 4) -> Html:
    """The mark of a series at a pixel: circle, square, triangle, diamond, cross."""
    names = f"{colour(index)} fill"
    told = element("title", title) if title else None
    shape = index % _SHAPES
    if shape == 0:
        return element("circle", told, class_=names, cx=x, cy=y, r=size)
    if shape == 1:
        side = size * 1.8
        box = {"x": round(x - side / 2, 2), "y": round(y - side / 2, 2)}
        return element("rect", told, class_=names, width=side, height=side, **box)
    points = {
        2: [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        4: _CROSS,
    }[shape]
    told_points = " ".join(f"{x + dx * size:.2f},{y + dy * size:.2f}" for dx, dy in points)
    return element("polygon", told, class_=names, points=told_points)


def path(points: Sequence[tuple[float, float]], *names: str) -> Html:
    """Pixels joined by straight lines."""
    moves = " ".join(f"{'L' if index else 'M'}{x} {y}" for index, (x, y) in enumerate(points))
    return element("path", class_=" ".join(("path", *names)), d=moves)


def steps(points: Sequence[tuple[float, float]], *names: str) -> Html:
    """Pixels joined by steps: first across, then up or down."""
    moves = "".join(f" H{x} V{y}" for x, y in points[1:])
    return element(
        "path", class_=" ".join(("path", *names)), d=f"M{points[0][0]} {points[0][1]}{moves}"
    )


def segment(x1: float, y1: float, x2: float, y2: float, names: str) -> Html:
    """A straight line."""
    return element("line", class_=names, x1=x1, y1=y1, x2=x2, y2=y2)


def text(x: float, y: float, told: str, *, anchor: str = "start", soft: bool = False) -> Html:
    """Words at a pixel of their base line."""
    return element(
        "text",
        told,
        x=round(x, 2),
        y=round(y, 2),
        text_anchor=anchor,
        class_="soft" if soft else None,
    )


def whisker(x1: float, y1: float, x2: float, y2: float, index: int) -> Html:
    """An interval: a line with a short bar at each end."""
    upright = x1 == x2
    dx, dy = (4.0, 0.0) if upright else (0.0, 4.0)
    moves = f"M{x1} {y1} L{x2} {y2} M{x1 - dx} {y1 - dy} L{x1 + dx} {y1 + dy}"
    moves += f" M{x2 - dx} {y2 - dy} L{x2 + dx} {y2 + dy}"
    return element("path", class_=f"whisker {colour(index)} stroke", d=moves)


def across(
    axis: Axis, values: Sequence[float], begin_px: float, end_px: float, *, zero: bool
) -> Scale:
    """A horizontal scale with as many ticks as their labels leave room for."""
    for num_ticks in (8, 6, 5, 4, 3):
        scale = Scale(axis, values, begin_px, end_px, zero=zero, num_ticks=num_ticks)
        ends = [(scale(at), width_px(label) / 2) for at, label in scale.ticks]
        gaps = [(x2 - half2) - (x1 + half1) for (x1, half1), (x2, half2) in pairwise(ends)]
        if min(gaps, default=9) >= 8:
            return scale
    # Labels of a fixed or very large range: the first and the last, and what is free between.
    kept: list[tuple[float, str]] = []
    edge = float("-inf")
    for at, label in scale.ticks:
        if scale(at) - width_px(label) / 2 > edge + 8:
            kept.append((at, label))
            edge = scale(at) + width_px(label) / 2
    scale.ticks = kept
    return scale


class Frame:
    """A plot's two scales, its grid and its labels."""

    def __init__(
        self,
        x: Axis,
        y: Axis,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        height: float = 320,
        zero_y: bool = False,
    ) -> None:
        self.height = height
        self.y = Scale(y, ys, height - BOTTOM, TOP, zero=zero_y)
        left = max((width_px(label) for _, label in self.y.ticks), default=0) + 14
        self.left, self.right = max(left, 36.0), WIDTH - 24
        self.x = across(x, xs, self.left, self.right, zero=False)

    def draw(self, shapes: Iterable[Html], *, title: str, description: str) -> Html:
        """The SVG: grid, shapes, axes."""
        floor = self.height - BOTTOM
        lines, labels = [], []
        for value, label in self.y.ticks:
            y = self.y(value)
            lines.append(segment(self.left, y, self.right, y, "grid"))
            labels.append(text(self.left - 7, y + 4, label, anchor="end", soft=True))
        for value, label in self.x.ticks:
            x = self.x(value)
            lines.append(segment(x, floor, x, floor + 4, "axis"))
            labels.append(text(x, floor + 17, label, anchor="middle", soft=True))
        middle = (self.left + self.right) / 2
        labels.append(text(middle, self.height - 8, self.x.title, anchor="middle"))
        labels.append(text(4, 14, self.y.title))
        base = segment(self.left, floor, self.right, floor, "axis")
        return canvas(
            [*lines, base, *shapes, *labels],
            height=self.height,
            title=title,
            description=description,
        )

    def limit_x(self, value: float | None, unit: str) -> list[Html]:
        """An upright line for a limit on x, with what it is."""
        if value is None or not self.x.low <= value <= self.x.high:
            return []
        x = self.x(value)
        anchor = "end" if x > WIDTH * 0.8 else "start"
        label = text(
            x + (-5 if anchor == "end" else 5),
            TOP - 4,
            f"limit {quantity(value, unit)}",
            anchor=anchor,
            soft=True,
        )
        return [segment(x, TOP - 12, x, self.height - BOTTOM, "limit"), label]

    def limit_y(self, value: float | None, unit: str) -> list[Html]:
        """A level line for a limit on y, with what it is."""
        if value is None or not self.y.low <= value <= self.y.high:
            return []
        y = self.y(value)
        label = text(self.right, y - 5, f"limit {quantity(value, unit)}", anchor="end", soft=True)
        return [segment(self.left, y, self.right, y, "limit"), label]


def canvas(shapes: Iterable[Html], *, height: float, title: str, description: str) -> Html:
    """An SVG that says what it shows to who cannot see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
    )


def legend(names: Sequence[str], *, lines: bool = True, marks: bool = False) -> Html | None:
    """Which series is which; None where there is one without a name."""
    if not any(names):
        return None
    items = []
    for index, name in enumerate(names):
        sample = [path([(1, 6), (27, 6)], colour(index), "stroke", dash(index))] if lines else []
        if marks or not lines:
            sample.append(marker(index, 14, 6))
        drawn = element("svg", *sample, viewBox="0 0 28 12", aria_hidden="true")
        items.append(element("li", drawn, name))
    return element("ul", *items, class_="legend")


def figure(
    title: str, drawn: Html, *, note: str = "", names: Html | None = None, table: Html | None = None
) -> Html:
    """A drawing with its title, its legend, a note, and its numbers to open."""
    behind = element("details", element("summary", "Numbers"), table) if table else None
    told = element("p", note, class_="note") if note else None
    return element("figure", element("figcaption", title), join([names, drawn, told, behind]))


def nothing(title: str, reason: str) -> Html:
    """A figure of which no value is there."""
    told = element("p", f"Nothing to draw: {reason}.", class_="note")
    return element("figure", element("figcaption", title), told)

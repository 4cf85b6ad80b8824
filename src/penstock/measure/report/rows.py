"""Plots with one thing a row: bars, and differences with their intervals (forest plots)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from penstock.measure.report.axes import Axis, Scale, shorten, width_px
from penstock.measure.report.drawing import (
    WIDTH,
    across,
    canvas,
    colour,
    figure,
    legend,
    marker,
    nothing,
    segment,
    text,
    whisker,
)
from penstock.measure.report.html import Html, element
from penstock.measure.report.tables import Column, table
from penstock.measure.report.units import ABSENT, number, quantity, step_of

_LABEL_PX, _TOP, _BOTTOM = 230.0, 24.0, 46.0


class Bar(NamedTuple):
    """A bar from zero, with its confidence interval if there is one; None: not there."""

    label: str
    value: float | None
    interval: tuple[float, float] | None = None
    series: str = ""


class Effect(NamedTuple):
    """A difference or a ratio with its confidence interval; None: it could not be computed."""

    label: str
    estimate: float | None
    low: float | None
    high: float | None
    note: str = ""  # such as `not worse` or `cannot tell`


def bars(
    items: Sequence[Bar],
    axis: Axis,
    *,
    title: str,
    note: str = "",
    limit: float | None = None,
    interval_name: str = "95 % confidence interval",
) -> Html:
    """Horizontal bars from zero, in the order given."""
    there = [item for item in items if item.value is not None and axis.fits(item.value)]
    if not there:
        return nothing(title, "no value is there")
    values = [end for item in there for end in (item.value or 0.0, *(item.interval or ()))]
    told = {item.label: quantity(item.value, axis.unit) for item in there}
    beside = max(width_px(value) for value in told.values()) + 14
    left = _left([item.label for item in items])
    # Bars of an axis of logarithms would begin anywhere: bars begin at zero.
    scale = across(
        axis._replace(log=False), [*values, *_listed(limit)], left, WIDTH - beside, zero=True
    )
    names = list(dict.fromkeys(item.series for item in items))
    shapes: list[Html] = []
    for row, item in enumerate(items):
        y = _TOP + row * 26 + 13
        shapes.append(_label(item.label, left, y))
        if item not in there:
            shapes.append(text(scale(0) + 6, y + 4, ABSENT, soft=True))
            continue
        shapes += _bar(item, scale, y, names.index(item.series), told[item.label])
    shapes += _limit(scale, limit, len(items) * 26, f"limit {quantity(limit, axis.unit)}")
    column = Column(axis.title, axis.unit)
    head: list[Column | str] = ["", column]
    with_intervals = any(item.interval for item in items)
    if with_intervals:
        head += [Column("low", axis.unit), Column("high", axis.unit)]
    rows = [
        [_named(item), item.value, *((item.interval or (None, None)) if with_intervals else ())]
        for item in items
    ]
    note = " ".join([*([f"Whiskers: {interval_name}."] if with_intervals else []), note]).strip()
    return figure(
        title,
        _draw(shapes, scale, len(items) * 26, left, title),
        note=note,
        names=legend(names, lines=False) if len(names) > 1 else None,
        table=table(head, rows),
    )


def forest(
    effects: Sequence[Effect],
    axis: Axis,
    *,
    title: str,
    note: str = "",
    reference: float = 0.0,
    margin: float | None = None,
    interval_name: str = "95 % confidence interval",
) -> Html:
    """Differences with their intervals, beside the line of no effect and that of the margin.

    Args:
        reference: the value of no effect: 0 of differences, 1 of ratios.
        margin: what a loss may be at most, in the unit and with the sign of the axis.
    """
    values = [
        value
        for effect in effects
        for value in (effect.estimate, effect.low, effect.high)
        if value is not None and axis.fits(value)
    ]
    if not values:
        return nothing(title, "no difference could be computed")
    told = [_told(effect, axis.unit) for effect in effects]
    beside = min(max(width_px(line) for line in told) + 14, 300.0)
    left = _left([effect.label for effect in effects])
    spread = axis if axis.log else axis._replace(low=axis.low, high=axis.high)
    scale = across(spread, [*values, reference, *_listed(margin)], left, WIDTH - beside, zero=False)
    height = len(effects) * 28.0
    shapes = []
    if scale.low <= reference <= scale.high:
        x = scale(reference)
        shapes.append(segment(x, _TOP, x, _TOP + height, "axis"))
    shapes += _limit(scale, margin, height, f"margin {quantity(margin, axis.unit)}")
    for row, (effect, line) in enumerate(zip(effects, told, strict=True)):
        y = _TOP + row * 28 + 14
        shapes.append(_label(effect.label, left, y))
        shapes.append(text(WIDTH - beside + 10, y + 4, shorten(line, beside - 10)))
        if effect.low is not None and effect.high is not None:
            shapes.append(whisker(scale(effect.low), y, scale(effect.high), y, 0))
        if effect.estimate is not None:
            shapes.append(marker(1, scale(effect.estimate), y, title=f"{effect.label}: {line}"))
    ends = (Column("low", axis.unit), Column("high", axis.unit))
    rows = [[item.label, item.estimate, item.low, item.high, item.note] for item in effects]
    return figure(
        title,
        _draw(shapes, scale, height, left, title),
        note=f"Lines: {interval_name}. {note}".strip(),
        table=table(["", Column(axis.title, axis.unit), *ends, "verdict"], rows),
    )


def _bar(item: Bar, scale: Scale, y: float, index: int, told: str) -> list[Html]:
    assert item.value is not None
    zero, end = scale(0), scale(item.value)
    shape = element(
        "rect",
        element("title", f"{_named(item)}: {told}"),
        class_=f"{colour(index)} fill" + (" weak" if item.interval else ""),
        x=min(zero, end),
        y=y - 8,
        width=round(abs(end - zero), 2),
        height=16,
    )
    if item.interval is None:
        return [shape, text(max(zero, end) + 6, y + 4, told)]
    low, high = (scale(value) for value in item.interval)
    words = text(max(zero, end, high) + 8, y + 4, told)
    return [shape, whisker(low, y, high, y, index), words]


def _told(effect: Effect, unit: str) -> str:
    """`−0.40 [−1.10, 0.30] points not worse`: all three numbers in one unit."""
    if effect.estimate is None:
        return f"{ABSENT} {effect.note}".rstrip()
    ends = [end for end in (effect.low, effect.high) if end is not None]
    step = step_of(unit, max(abs(value) for value in (effect.estimate, *ends)))
    told = [number(float(value / step.divisor)) for value in (effect.estimate, *ends)]
    line = f"{told[0]} [{told[1]}, {told[2]}]" if len(ends) == 2 else told[0]
    return f"{line} {step.label} {effect.note}".replace("  ", " ").rstrip()


def _named(item: Bar) -> str:
    return f"{item.label}, {item.series}" if item.series else item.label


def _listed(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _left(labels: Sequence[str]) -> float:
    return min(max((width_px(label) for label in labels), default=0) + 14, _LABEL_PX)


def _label(label: str, left: float, y: float) -> Html:
    return element(
        "text",
        element("title", label),
        shorten(label, left - 12),
        x=left - 8,
        y=y + 4,
        text_anchor="end",
    )


def _limit(scale: Scale, value: float | None, height: float, told: str) -> list[Html]:
    if value is None or not scale.low <= value <= scale.high:
        return []
    x = scale(value)
    half = width_px(told) / 2
    middle = min(max(x, half + 4), WIDTH - half - 4)
    words = text(middle, _TOP - 8, told, anchor="middle", soft=True)
    return [segment(x, _TOP - 4, x, _TOP + height, "limit"), words]


def _draw(shapes: list[Html], scale: Scale, height: float, left: float, title: str) -> Html:
    floor = _TOP + height
    grid, labels = [], []
    for value, label in scale.ticks:
        x = scale(value)
        grid.append(segment(x, _TOP, x, floor, "grid"))
        labels.append(text(x, floor + 17, label, anchor="middle", soft=True))
    middle = (left + scale.end_px) / 2
    labels.append(text(middle, floor + 38, scale.title, anchor="middle"))
    return canvas(
        [*grid, *shapes, *labels],
        height=floor + _BOTTOM,
        title=title,
        description=f"One row for each of {scale.title}; the numbers are in the table below.",
    )

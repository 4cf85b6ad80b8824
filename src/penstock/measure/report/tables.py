"""Tables of a page: a unit for a whole column, numbers to the right, absent values with a reason.

Knows columns and rows, not what they are about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from penstock.measure.report.html import Html, element, escape, join
from penstock.measure.report.units import ABSENT, STEPS, Step, number, quantity, step_of, usd

Row = Sequence[Any]
_WIDE: Final = 9  # columns, from which on the letters are smaller on paper
_ONE_UNIT: Final = 1000  # how far apart numbers of a column are that still share a unit


class Absent(NamedTuple):
    """A figure that is not there, and why; shown as `—`, the reason where the pointer rests."""

    reason: str


class Marked(NamedTuple):
    """A value with something to know about it, such as a quantile of too few requests."""

    value: Any
    note: str


class Column(NamedTuple):
    """A column. Its numbers are in `unit` (see `units`), and shown in one unit if they can be."""

    title: str
    unit: str = ""
    help: str = ""  # what the figure is, or its formula


def table(columns: Sequence[Column | str], rows: Iterable[Row], *, caption: str = "") -> Html:
    """A table.

    Args:
        columns: a `str` is a column without a unit.
        rows: cells are text, numbers, `Html`, None, `Absent`, or `Marked` around one of these. The
            first cell of a row names it.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    heads = [Column(column) if isinstance(column, str) else column for column in columns]
    body = [list(row) for row in rows]
    if any(len(row) != len(heads) for row in body):
        raise ValueError(f"a row of the table {caption!r} does not have {len(heads)} cells")
    layout = _one_rule([_layout(head, [row[at] for row in body]) for at, head in enumerate(heads)])
    lines = [
        element("tr", *(_cell(cell, layout[at], first=at == 0) for at, cell in enumerate(row)))
        for row in body
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else None,
            element("thead", element("tr", *map(_head, layout))),
            element("tbody", *lines),
            class_="wide" if len(heads) > _WIDE else None,
        ),
        class_="scroll",
        tabindex="0",
        role="group",
        aria_label=caption or "table",
    )


def pairs(facts: Mapping[str, Any]) -> Html:
    """Names and values below one another; a mapping or list within is shown as JSON has it."""
    rows = [
        element("tr", element("th", name, scope="row"), element("td", _text(value), class_="text"))
        for name, value in facts.items()
    ]
    return element(
        "div", element("table", element("tbody", *rows), class_="pairs"), class_="scroll"
    )


def cards(facts: Iterable[tuple[str, str, str]]) -> Html:
    """Large figures for the top of a page: name, value as text, a line below it."""
    made = [
        element(
            "div",
            element("dt", name),
            element("dd", element("strong", value), element("span", note) if note else None),
            class_="card",
        )
        for name, value, note in facts
    ]
    return element("dl", *made, class_="cards")


class _Layout(NamedTuple):
    """How the cells of a column are shown."""

    column: Column
    scale: Step | None  # the unit of all its numbers; None: each in the one that suits it
    numeric: bool  # it has numbers, and nothing beside them but absent ones


def _layout(column: Column, cells: Sequence[Any]) -> _Layout:
    """One unit reads best, but not where it turns microseconds into 0.0001 seconds."""
    values = [cell.value if isinstance(cell, Marked) else cell for cell in cells]
    numbers = [value for value in values if _is_number(value)]
    others = [value for value in values if not _is_number(value) and value is not None]
    numeric = bool(numbers) and all(isinstance(value, Absent) for value in others)
    sizes = [abs(value) for value in numbers if value] or [0]
    apart = max(sizes) >= _ONE_UNIT * min(sizes) > 0
    if apart and len(STEPS.get(column.unit, ())) > 1:
        return _Layout(column, None, numeric)
    return _Layout(column, step_of(column.unit, max(sizes)), numeric)


def _one_rule(layout: list[_Layout]) -> list[_Layout]:
    """Units stand in all heads of a table, or in the cells of all columns whose units have steps.

    A table with `40.5 ms` in one column and a head `(ms)` over bare numbers in the next misleads.
    """
    if all(one.scale is not None for one in layout):
        return layout
    return [
        one._replace(scale=None) if len(STEPS.get(one.column.unit, ())) > 1 else one
        for one in layout
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _head(layout: _Layout) -> Html:
    column, scale, numeric = layout
    title = f"{column.title} ({scale.label})" if scale and scale.label else column.title
    names = "number" if numeric else None
    return element("th", title, scope="col", title=column.help or None, class_=names)


def _cell(cell: Any, layout: _Layout, *, first: bool) -> Html:
    note = None
    if isinstance(cell, Marked):
        cell, note = cell
    if isinstance(cell, Absent):
        cell, note = None, cell.reason
    if isinstance(cell, float) and not math.isfinite(cell):
        cell, note = None, note or "not a number"
    if cell is None:
        names = "number absent" if layout.numeric else "absent"
        return element("td", ABSENT, class_=names, title=note or "not there")
    mark = element("abbr", "*", title=note) if note else None
    if _is_number(cell):
        scale = layout.scale
        text = quantity(cell, layout.column.unit) if scale is None else _shown(cell, scale)
        return element("td", text, mark, class_="number", data_value=repr(cell))
    if first:
        return element("th", escape(cell), mark, scope="row")
    return element("td", escape(cell), mark, class_="text")


def _shown(value: float, scale: Step) -> str:
    """A number in its column's unit, which stands in the head."""
    if scale.label == "$":
        return usd(value).replace("$", "")
    return number(value if scale.divisor == 1 else value / scale.divisor)


def _text(value: Any) -> Any:
    """A fact for people; what has parts is JSON."""
    if isinstance(value, Html | str):
        return value
    if value is None:
        return ABSENT
    if _is_number(value):
        return repr(value)  # a setting is what it is: not rounded
    if isinstance(value, Mapping) and value:
        return pairs(value)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(part, Mapping) for part in value):
            return join(pairs(part) for part in value)
        return join((element("code", _text(part)) for part in value), " ")
    return {True: "yes", False: "no"}.get(value, ABSENT) if isinstance(value, bool) else ABSENT

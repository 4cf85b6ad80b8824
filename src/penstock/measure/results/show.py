"""Figures of any kind of run as text for a terminal: things of one shape as a table.

Knows JSON and the units at the end of names, no figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from penstock.measure.report.units import ABSENT, number, quantity

_UNITS: Final = {
    "_s": "s",
    "_bytes": "bytes",
    "_j": "J",
    "joules": "J",
    "_w": "W",
    "_wh": "Wh",
    "_usd": "usd",
    "_share": "%",
    "_grams": "g",
}


def lines(figures: Mapping[str, Any], *, width: int = 100) -> Iterator[str]:
    """The figures, one line after the other; nothing is left out but the ends of long texts."""
    yield from _mapping(figures, 0, "", width)


def cell(value: Any, name: str = "", *, limit: int = 60) -> str:
    """A value as text: with the unit that its name ends with; a longer text loses its end."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return quantity(value, unit) if (unit := _unit(name)) else number(value)
    text = str(value).replace("\n", " ")
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def grid(rows: Sequence[Sequence[str]], *, right: Sequence[bool] = ()) -> Iterator[str]:
    """Rows in columns; the first row is the head. `right`: which columns are numbers."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        cells = (
            text.rjust(width) if index < len(right) and right[index] else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _unit(name: str) -> str:
    lower = name.lower()
    if lower.endswith("_per_s"):
        return "/s"  # of what, its name says
    return next((unit for end, unit in _UNITS.items() if lower.endswith(end)), "")


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(
        isinstance(inner, Mapping | list) for inner in value.values()
    )


def _mapping(value: Mapping[str, Any], depth: int, name: str, width: int) -> Iterator[str]:
    pad = "  " * depth
    table = _alike(value)
    shown = False
    for key, inner in value.items():
        if key in table:
            if not shown:
                yield from _table(table, depth, name, width)
                shown = True
        elif isinstance(inner, Mapping) and inner:
            yield f"{pad}{key}"
            yield from _mapping(inner, depth + 1, key, width)
        elif isinstance(inner, list) and inner:
            yield f"{pad}{key}"
            yield from _list(inner, depth + 1, key, width)
        else:
            empty = isinstance(inner, Mapping | list)
            yield f"{pad}{key:<24} {ABSENT if empty else cell(inner, _above(key, name))}"


def _alike(value: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts that make a table: the most that have the same names in them, at least two."""
    shapes = Counter(tuple(inner) for inner in value.values() if _is_flat(inner) and len(inner) > 1)
    if not shapes or shapes.most_common(1)[0][1] < 2:
        return {}
    shape = shapes.most_common(1)[0][0]
    return {key: inner for key, inner in value.items() if _is_flat(inner) and tuple(inner) == shape}


def _list(values: Sequence[Any], depth: int, name: str, width: int) -> Iterator[str]:
    pad = "  " * depth
    if len(values) > 1 and all(_is_flat(value) for value in values):
        named = {str(index): value for index, value in enumerate(values)}
        yield from _table(named, depth, name, width)
        return
    for index, value in enumerate(values):
        if isinstance(value, Mapping):
            yield f"{pad}[{index}]"
            yield from _mapping(value, depth + 1, name, width)
        elif isinstance(value, list):
            yield f"{pad}[{index}]"
            yield from _list(value, depth + 1, name, width)
        else:
            yield f"{pad}{cell(value, name, limit=400)}"


def _table(rows: Mapping[str, Any], depth: int, name: str, width: int) -> Iterator[str]:
    """Things with the same parts below one another; too wide for the terminal: one by one."""
    heads = list(dict.fromkeys(key for row in rows.values() for key in row))
    body = []
    for key, row in rows.items():
        above = key if _unit(key) else name
        body.append([key, *(cell(row.get(head), _above(head, above)) for head in heads)])
    made = list(grid([["", *heads], *body], right=[False, *([True] * len(heads))]))
    pad = "  " * depth
    if len(pad) + max(len(line) for line in made) <= width:
        yield from (f"{pad}{line}" for line in made)
        return
    for key, row in rows.items():
        yield f"{pad}{key}"
        yield from _mapping(row, depth + 1, key if _unit(key) else name, width)


def _above(head: str, name: str) -> str:
    """What gives a cell its unit: its own name, or the name of the row; a count has none."""
    return "" if head == "n" or head.startswith("num_") else head if _unit(head) else name

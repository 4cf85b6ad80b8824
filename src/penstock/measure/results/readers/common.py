"""What every reader makes of a file, and the checks they share.

A figure that a file does not give (no field, or null) is absent. One that is there and cannot be
what its name says, such as a time of -5 or "x", is refused: it must not become another number.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.measure.metrics import OF_REQUEST
from penstock.measure.records import Arm, Request


class Imported(msgspec.Struct, kw_only=True):
    """The content of a file of another tool."""

    arm: Arm
    requests: list[Request] = []
    source: dict[str, Any] = {}  # figures that the tool computed, by its own names
    settings: dict[str, Any] = {}  # that the tool was given, by its own names
    date: str = ""  # when it ran, as the tool writes it
    notes: list[str] = []  # what a reader of the figures must know
    has_timeline: bool = True  # False: all requests begin at zero, because no times are there


def seconds_ns(value: float) -> int:
    """Seconds as nanoseconds."""
    return round(value * 1e9)


def number(value: Any, name: str) -> float | None:
    """A finite number; None where there is none.

    Raises:
        ValueError: it is anything else.
    """
    if value is None:
        return None
    try:
        if not isinstance(value, bool) and isinstance(value, int | float):
            found = float(value)
            if math.isfinite(found):
                return found
    except OverflowError:
        pass
    raise ValueError(f"`{name}` is `{str(value)[:40]}`, which is no number")


def duration(value: Any, name: str) -> float | None:
    """A length of time in whatever unit; None where there is none.

    Raises:
        ValueError: it is no number, or negative.
    """
    found = number(value, name)
    if found is not None and found < 0:
        raise ValueError(f"`{name}` is `{value}`, and no time is negative")
    return found


def count(value: Any, name: str) -> int | None:
    """A number of things; None where there is none.

    Raises:
        ValueError: it is no whole number from 0 on.
    """
    found = number(value, name)
    if found is not None and (found < 0 or not found.is_integer()):
        raise ValueError(f"`{name}` is `{value}`, which counts nothing")
    return None if found is None else int(found)


def check(requests: list[Request]) -> None:
    """Refuse times that follow from a file's moments and cannot be.

    Raises:
        ValueError: a request was answered before it was sent.
    """
    for row in requests:
        for name in ("ttft_s", "ttft_visible_s", "tpot_s", "e2e_s"):
            value = OF_REQUEST[name](row)
            if value is not None and value < 0:
                raise ValueError(f"request `{row.prompt_id}` has a `{name}` of `{value:g}`")


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """A list, or an empty one for anything else."""
    return value if isinstance(value, list) else []


def text(value: Any) -> str:
    """A text, or an empty one for anything else."""
    return value if isinstance(value, str) else ""


def same_length(source: str, **columns: list[Any]) -> int:
    """How long columns are that describe the same requests.

    Raises:
        ConfigError: they are not all of one length: the file is damaged.
    """
    lengths = {name: len(values) for name, values in columns.items() if values}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"`{name}`: {length}" for name, length in lengths.items())
        raise ConfigError(f"The lists of `{source}` have different lengths ({told}).")
    return max(lengths.values(), default=0)

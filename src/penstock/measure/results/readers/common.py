"""What every reader makes of a file, and the checks they share."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.errors import ConfigError
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


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == value and abs(value) != float("inf") else None


def count(value: Any) -> int | None:
    """A number of things, or None."""
    found = number(value)
    return None if found is None or found < 0 else int(found)


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

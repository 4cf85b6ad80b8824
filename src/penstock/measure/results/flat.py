"""Figures as a list of dotted paths and values: how runs are laid side by side.

Knows JSON, no figure. Things in a list that have a name are found by it, not by their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NAMES = ("arm", "stage", "task", "block", "name", "label", "model", "metric")


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values by their path, such as `arms.a.ttft_s.p99` or `stages[rate=4].goodput`."""
    return dict(_leaves(value, path)) if value or path else {}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value:
        names = _names(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{names[index] if names else index}]")
    else:
        yield path, value


def _names(values: list[Any]) -> list[str] | None:
    """What each thing of a list is called; None where not every one has a name of its own."""
    if not all(isinstance(value, dict) for value in values):
        return None
    names = [
        ",".join(str(value[key]) for key in _NAMES if value.get(key) and _is_name(value[key]))
        for value in values
    ]
    return names if all(names) and len(set(names)) == len(names) else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int)

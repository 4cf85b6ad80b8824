"""What the rendering of an untrusted template may still use, and the checks before costly steps.

Knows values and sizes, no Jinja syntax. Invariant: no value exceeds `max_chars`, and all the values
made in one rendering together do not exceed `16 * max_chars`.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

from jinja2 import Undefined
from jinja2.exceptions import SecurityError, TemplateError

MAX_INT_BITS = 4096
MAX_DEPTH = 100  # of containers in containers: Python hashes and frees them by recursion in C

_CONTAINERS = (list, tuple, dict)
_SCALARS = (int, float, Undefined, type(None))


class _Measure(NamedTuple):
    size: int
    depth: int  # containers around the innermost value


class TemplateLimitError(TemplateError):
    """A template has used up what one rendering may use."""


class Meter:
    """What one rendering may still use.

    Args:
        max_chars: size of one value: characters of a string, strings and items of a container,
            bits of an integer.
        max_s: seconds of this thread's processor time, so that a busy machine fails no rendering.
    """

    def __init__(self, max_chars: int, max_s: float) -> None:
        self.max_chars = max_chars
        self._fuel = 16 * max_chars
        self._max_s = max_s
        self._start_s = time.thread_time()
        self._look_s = time.monotonic() + max_s  # before that it cannot have used up its time
        # Of containers inside containers, which the sandbox keeps immutable. Holding the container
        # keeps its id from being used again.
        self._measures: dict[int, tuple[_Measure, object]] = {}
        # The latest lists made by `+`: templates grow lists so, and measuring each anew would
        # cost n * n.
        self._grown: deque[tuple[_Measure, object]] = deque(maxlen=4)

    def tick(self, cost: int = 1) -> None:
        """Pay for an operation."""
        self._fuel -= cost
        if self._fuel < 0:
            raise TemplateLimitError(f"it made more than {16 * self.max_chars} characters")
        if time.monotonic() > self._look_s:
            rest_s = self._start_s + self._max_s - time.thread_time()
            if rest_s <= 0:
                raise TemplateLimitError(f"it ran for more than {self._max_s:g} s")
            self._look_s = time.monotonic() + rest_s

    def allow(self, size: int) -> None:
        """Refuse a value of that size before it is made."""
        if size > self.max_chars:
            raise TemplateLimitError(f"a value has more than {self.max_chars} characters")

    def charge(self, value: Any) -> Any:
        """Pay for a value just made, and return it."""
        if isinstance(value, str):
            self.tick(1 + len(value))
            self.allow(len(value))
        elif isinstance(value, _CONTAINERS):
            self.tick(1 + len(value))
            self.allow(self.size(value))
        else:
            self.tick()
        return value

    def charge_sum(self, left: Any, right: Any, total: Any) -> Any:
        """Pay for `total = left + right`."""
        if not isinstance(total, list):
            return self.charge(total)
        self.tick(1 + len(total))
        parts = self._measure(left), self._measure(right)
        measure = _Measure(sum(part.size for part in parts) - 1, max(part.depth for part in parts))
        self.allow(measure.size)
        self._grown.append((measure, total))
        return total

    def charge_all(self, items: Iterable[Any]) -> list[Any]:
        """Pay for the items of a lazy sequence; together they must not exceed a value."""
        taken, total = [], 1
        for item in items:
            size = self.size(item)
            total += size
            self.tick(size)
            self.allow(total)
            taken.append(item)
        return taken

    def check_depth(self, values: Iterable[Any]) -> None:
        """Refuse containers that are nested too deep, however they came to be."""
        for value in values:
            if isinstance(value, _CONTAINERS):
                self._inner(value)

    def size(self, value: Any) -> int:
        """The size of a value written out; shared parts count as often as they occur.

        Raises:
            SecurityError: it is no data, which could hide a large inside or an address.
            TemplateLimitError: it is nested too deep.
        """
        return self._measure(value).size

    def _measure(self, value: Any) -> _Measure:
        if isinstance(value, str):
            return _Measure(1 + len(value), 0)
        if isinstance(value, int):
            return _Measure(1 + value.bit_length(), 0)
        if isinstance(value, _SCALARS):
            return _Measure(1, 0)
        if not isinstance(value, _CONTAINERS):
            raise SecurityError(f"a {type(value).__name__} cannot be part of a value")
        for measure, grown in self._grown:
            if value is grown:
                return measure
        size, depth = 1, 0
        for part in chain(value, value.values()) if isinstance(value, dict) else value:
            inner = self._inner(part)
            size += inner.size
            depth = max(depth, inner.depth)
        if depth >= MAX_DEPTH:
            raise TemplateLimitError(f"a value is nested deeper than {MAX_DEPTH}")
        return _Measure(size, depth + 1)

    def _inner(self, value: Any) -> _Measure:
        """The measure of a value in a container."""
        if not isinstance(value, _CONTAINERS):
            return self._measure(value)
        known = self._measures.get(id(value))
        if known is None:
            known = self._measures[id(value)] = (self._measure(value), value)
        return known[0]


METER: ContextVar[Meter] = ContextVar("penstock_template_meter")  # of this rendering


def printed(value: Any) -> str:
    """What `str` would make of a value, if it is data and not too large."""
    if type(value) is str:
        return value
    if not isinstance(value, (str, *_CONTAINERS, *_SCALARS)):
        raise SecurityError(f"a {type(value).__name__} cannot be printed")
    METER.get().allow(METER.get().size(value))
    return str(value)


def concat(parts: Iterable[str]) -> str:
    """The parts joined, and paid for."""
    parts = list(parts)
    meter = METER.get()
    meter.allow(sum(map(len, parts)))
    joined: str = meter.charge("".join(parts))
    return joined


def allow_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse `left operator right` where its result would be too large, or costly to compute."""
    meter = METER.get()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        num_bits = {"*": sum(bits), "**": bits[0] * right}.get(operator, max(bits))
        if num_bits > MAX_INT_BITS:
            raise TemplateLimitError(f"an integer has more than {MAX_INT_BITS} bits")
    elif operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(value, (str, *_CONTAINERS)) and isinstance(count, int):
                meter.allow(meter.size(value) * count)
    elif operator == "%" and isinstance(left, str):
        check_format(left)
        values = tuple(right.values()) if isinstance(right, dict) else right
        allow_format(left, left.count("%"), values if isinstance(values, tuple) else (values,))


def allow_replace(text: str, old: Any, new: Any) -> None:
    """Refuse `text.replace(old, new)` where it would be too large."""
    if isinstance(old, str) and isinstance(new, str):
        METER.get().allow(len(text) + text.count(old) * len(new))


def check_format(spec: str) -> None:
    """No width or precision that is large or comes from an argument."""
    if re.search(r"\d{4}|\*|\{", spec):
        raise SecurityError(f"the format {spec!r} is not allowed")


def allow_format(template: str, num_fields: int, values: Iterable[Any]) -> None:
    """Refuse a format whose fields could be too large, or are no data."""
    meter = METER.get()
    largest = max((meter.size(value) for value in values), default=0)
    meter.allow(len(template) + num_fields * (largest + 1000))  # a width has three digits

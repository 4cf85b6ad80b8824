"""Numbers as people read them: three significant digits, a unit, thousands apart.

A unit is a name such as `s` or `bytes`; values of it are always in that unit, and only the text
chooses milliseconds or GiB. An unknown unit is written behind the number as it is.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

ABSENT: Final = "—"


class Step(NamedTuple):
    """From `least` on, a value is divided by `divisor` and called `label`."""

    least: float
    divisor: float
    label: str


def _decimal(label: str) -> list[Step]:
    """From micro to giga."""
    prefixes = {1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "µ"}
    return [Step(size, size, prefix + label) for size, prefix in prefixes.items()]


STEPS: Final[dict[str, list[Step]]] = {
    "s": [
        Step(3 * 3600, 3600, "h"),
        Step(600, 60, "min"),
        Step(1, 1, "s"),
        Step(1e-3, 1e-3, "ms"),
        Step(1e-6, 1e-6, "µs"),
    ],
    "bytes": [
        Step(2.0**40, 2.0**40, "TiB"),
        Step(2.0**30, 2.0**30, "GiB"),
        Step(2.0**20, 2.0**20, "MiB"),
        Step(2.0**10, 2.0**10, "KiB"),
        Step(1, 1, "B"),
    ],
    "J": _decimal("J"),
    "W": _decimal("W"),
    "Wh": _decimal("Wh"),
    "g": [Step(1e6, 1e6, "t"), *_decimal("g")[2:]],
    "%": [Step(0, 0.01, "%")],  # of a share: 1 is 100 %
    "points": [Step(0, 0.01, "points")],  # percentage points, of a difference of shares
    "usd": [Step(0, 1, "$")],
}


def step_of(unit: str, size: float) -> Step:
    """How values of a unit that are about this large are best written."""
    steps = STEPS.get(unit)
    if steps is None:
        return Step(0, 1, unit)
    if size == 0:
        return next((step for step in steps if step.divisor == 1), steps[0])
    return next((step for step in steps if abs(size) >= step.least), steps[-1])


def number(value: float) -> str:
    """Three significant digits and at least all whole ones; whole numbers exactly."""
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        text = f"{value:.2e}"
    elif size >= 99.95:
        text = f"{value:,.0f}"
    else:
        digits = 2 if size == 0 else 2 - math.floor(math.log10(float(f"{size:.2e}")))
        text = f"{value:.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = "0"
    return text.replace("-", "−")


def quantity(value: float | None, unit: str = "") -> str:
    """A value and its unit, such as `12.5 ms`; `—` for None."""
    if value is None:
        return ABSENT
    step = step_of(unit, value)
    shown = value if step.divisor == 1 else value / step.divisor
    if step.label == "$":
        return usd(value)
    return f"{number(shown)} {step.label}".rstrip()


def seconds(value: float | None) -> str:
    """`12.5 ms`."""
    return quantity(value, "s")


def joules(value: float | None) -> str:
    """`12.5 kJ`."""
    return quantity(value, "J")


def percent(value: float | None) -> str:
    """A share as `12.5 %`."""
    return quantity(value, "%")


def usd(value: float | None) -> str:
    """`$1.25`; small amounts with three significant digits."""
    if value is None:
        return ABSENT
    size = abs(value)
    text = f"{size:,.2f}" if size >= 1 or size == 0 else number(float(size))
    return f"{'−' if value < 0 else ''}${text}"


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """`12.1 to 13.5 ms`: both ends in the unit of the larger."""
    if low is None or high is None:
        return ABSENT
    step = step_of(unit, max(abs(low), abs(high)))
    if step.label == "$":
        return f"{usd(low)} to {usd(high)}"
    ends = [number(end if step.divisor == 1 else end / step.divisor) for end in (low, high)]
    return f"{ends[0]} to {ends[1]} {step.label}".rstrip()

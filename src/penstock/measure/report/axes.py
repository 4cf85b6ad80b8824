"""Axes: which values are written beside a plot, and where they lie in it.

Knows numbers and pixels, nothing of series. Ticks are 1, 2 or 5 times a power of ten, of the unit
that is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from penstock.measure.report.units import Step, step_of

_HUGE: Final = 1e100
_EAST_ASIAN: Final = 0x2E80  # from here on, characters are about square


class Axis(NamedTuple):
    """What a plot shows along one side. Values are in `unit` (see `units`)."""

    title: str
    unit: str = ""
    log: bool = False
    low: float | None = None  # else as the values have it
    high: float | None = None

    def fits(self, value: float) -> bool:
        """Whether a value has a place: not infinite, nor near to it; positive on a log axis."""
        return abs(value) < _HUGE and (value > 1 / _HUGE or not self.log)


class Scale:
    """Places values of an axis between two pixels."""

    def __init__(
        self,
        axis: Axis,
        values: Iterable[float],
        begin_px: float,
        end_px: float,
        *,
        zero: bool = False,
        num_ticks: int = 6,
    ) -> None:
        """Choose the range and the ticks.

        Args:
            begin_px: where the lowest value lies; may be above `end_px`, as on upright axes.
            zero: the axis begins at zero, as that of bars must.
            num_ticks: about how many.
        """
        self.axis = axis
        self.begin_px, self.end_px = begin_px, end_px
        low, high = _range(axis, [value for value in values if axis.fits(value)], zero)
        size = max(abs(low), abs(high))
        self.step: Step = step_of(axis.unit, math.sqrt(low * high) if axis.log else size)
        divisor = self.step.divisor
        # The whole axis is in the shown unit: 1-2-5 of minutes are not 1-2-5 of seconds.
        ends = (low / divisor, high / divisor)
        fixed = (axis.low is not None, axis.high is not None)
        if axis.log:
            shown, ends = log_ticks(*ends, num_ticks=num_ticks, fixed=fixed)
        else:
            shown, ends = linear_ticks(*ends, num_ticks=num_ticks, fixed=fixed)
        self.low, self.high = ends[0] * divisor, ends[1] * divisor
        digits = _digits(shown)
        self.ticks = [(value * divisor, _label(value, digits)) for value in shown]
        self.title = f"{axis.title} ({self.step.label})" if self.step.label else axis.title
        if axis.log:
            self.title += ", log scale"

    def __call__(self, value: float) -> float:
        """The pixel of a value; one beyond the axis is placed at its end."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.axis.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return round(self.begin_px + share * (self.end_px - self.begin_px), 2)


def _range(axis: Axis, values: Sequence[float], zero: bool) -> tuple[float, float]:
    """Lowest and highest value of an axis, never the same."""
    low = min(values, default=1.0 if axis.log else 0.0)
    high = max(values, default=10.0 if axis.log else 1.0)
    if not axis.log and (zero or 0 <= low <= 0.6 * high):
        low = min(low, 0.0)
    if zero and not axis.log:
        high = max(high, 0.0)
    low = low if axis.low is None else axis.low
    high = high if axis.high is None else axis.high
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1 / _HUGE):
        return low, high
    if axis.log:
        return low / 2, low * 2
    spread = abs(low) / 10 or 1.0
    return low - (0 if low == 0 and zero else spread), low + spread


def _steps(span: float, num_ticks: int) -> float:
    """The 1-2-5 step that cuts a span into at most about `num_ticks` parts."""
    rough = span / max(num_ticks, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def linear_ticks(
    low: float, high: float, *, num_ticks: int = 6, fixed: tuple[bool, bool] = (False, False)
) -> tuple[list[float], tuple[float, float]]:
    """Ticks, and the range widened to a tick at each end that is not fixed."""
    step = _steps(high - low, num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ends = (low if fixed[0] else first * step, high if fixed[1] else last * step)
    slack = step * 1e-6
    ticks = [_clean(count * step, step) for count in range(first, last + 1)]
    return [tick for tick in ticks if ends[0] - slack <= tick <= ends[1] + slack], ends


def log_ticks(
    low: float, high: float, *, num_ticks: int = 6, fixed: tuple[bool, bool] = (False, False)
) -> tuple[list[float], tuple[float, float]]:
    """The same for an axis of logarithms: decades, with 2 and 5 where there is room."""
    if high < 3 * low:  # within a decade: 2 and 5 would be too few
        inside, (begin, end) = linear_ticks(low, high, num_ticks=num_ticks, fixed=fixed)
        return [tick for tick in inside if tick > 0], (begin if begin > 0 else low, end)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: tuple[int, ...] = (1, 2, 5) if 3 * (last - first) <= 2 * num_ticks else (1,)
    every = max(1, math.ceil((last - first) / num_ticks))
    powers = range(first, last + every, 1 if len(factors) > 1 else every)
    marks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    below = [mark for mark in marks if mark <= low * 1.001]
    above = [mark for mark in marks if mark >= high * 0.999]
    ends = (low if fixed[0] else below[-1], high if fixed[1] else above[0])
    return [mark for mark in marks if ends[0] * 0.999 <= mark <= ends[1] * 1.001], ends


def _clean(value: float, step: float) -> float:
    """Without the dust of floating point: 0.30000000000000004 is 0.3."""
    return round(value, max(0, 1 - math.floor(math.log10(step))))


def _digits(ticks: Sequence[float]) -> int | None:
    """Decimals with which all ticks of a linear axis are told exactly; None: each as it is."""
    for digits in range(5):
        if all(math.isclose(tick, round(tick, digits), abs_tol=1e-9) for tick in ticks):
            return digits
    return None


def _label(value: float, digits: int | None) -> str:
    size = abs(value)
    if digits is None or size >= 1e9 or 0 < size < 1e-4:
        return f"{value:g}".replace("-", "−")
    if size >= 1e6:
        return f"{value / 1e6:g}M".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def width_px(text: str) -> float:
    """About how wide a label is: rather too wide than too narrow, whatever the font is."""
    return sum(_character_px(character) for character in text)


def _character_px(character: str) -> float:
    """Of a wide sans-serif font at 12 px."""
    if character in "mwMW@%—…" or ord(character) >= _EAST_ASIAN:
        return 12.0
    if character in "iljtfrI.,:;|!'()[] ":
        return 5.0
    return 8.4 if character.isupper() else 7.6


def shorten(text: str, limit_px: float) -> str:
    """A label that fits, its end cut off if it must be."""
    if width_px(text) <= limit_px:
        return text
    kept = text
    while len(kept) > 1 and width_px(kept + "…") > limit_px:
        kept = kept[:-1]
    return kept + "…"

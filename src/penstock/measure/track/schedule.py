"""The slots of a schedule: moments that depend on nothing but the schedule, so that a restart, or
another machine, finds the same ones and can tell which were missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from penstock.errors import ConfigError
from penstock.measure.track.config import Schedule, interval_s

DAYS = 365.25  # of a year
YEAR_S = 365 * 86400
MAX_COUNTED = 5000  # slots: a cron expression takes 40 us for each

Slots = Callable[[int], Iterator[int]]  # the slots after a moment, both in seconds since 1970


def slots_of(schedule: Schedule) -> Slots:
    """The slots of a schedule.

    Raises:
        ConfigError: the expression, the interval or the time zone is none.
    """
    if schedule.every is not None:
        every_s = interval_s(schedule.every)
        return lambda after: _every(every_s, after)
    assert schedule.cron is not None
    from cronsim import CronSim, CronSimError

    expression = schedule.cron
    try:
        zone = ZoneInfo(schedule.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(
            f"`schedule.timezone` is `{schedule.timezone}`.", hint="such as UTC or Europe/Berlin"
        ) from None

    def from_cron(after: int) -> Iterator[int]:
        begin = datetime.fromtimestamp(after, UTC).astimezone(zone)
        for moment in CronSim(expression, begin):
            yield int(moment.timestamp())

    try:
        next(from_cron(0))
    except (CronSimError, StopIteration):
        raise ConfigError(
            f"`schedule.cron` is `{expression}`.",
            hint="minute, hour, day, month, weekday, such as */30 * * * *",
        ) from None
    return from_cron


def _every(every_s: int, after: int) -> Iterator[int]:
    slot = after // every_s * every_s
    while True:
        slot += every_s
        yield slot


def per_year(slots: Slots, after: int) -> float:
    """How many slots a year has: those of the next year, or from the first thousands of them."""
    last, num = after, 0
    for moment in slots(after):
        if num and moment > after + YEAR_S:
            break
        last, num = moment, num + 1
        if num == MAX_COUNTED:
            return num * DAYS * 86400 / (last - after)
    return num * DAYS * 86400 / max(last - after, YEAR_S)

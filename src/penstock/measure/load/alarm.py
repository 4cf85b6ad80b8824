"""Wakes at a moment, to some ten microseconds where Linux has timerfd.

asyncio's own timers wait in whole milliseconds (epoll), so that every request would leave up to one
too late: much, against the first token of a small model. Elsewhere, its timers have to do.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_NS = 10**9


class _Spec(ctypes.Structure):
    """struct itimerspec: interval, then value, in seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]


class Alarm:
    """For one waiter at a time, in the loop in which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: asyncio.Future[None] | None = None
        self._fd = _timer()
        if self._fd is not None:
            self._loop.add_reader(self._fd, self._ring)

    async def until(self, perf_counter_ns: int) -> None:
        """Wait for a moment of `time.perf_counter_ns`; if it is over, let others run first."""
        left_ns = perf_counter_ns - time.perf_counter_ns()
        if left_ns <= 0 or self._fd is None:
            await asyncio.sleep(max(0, left_ns) / _NS)
            # A loop's timers may be early.
            while (left_ns := perf_counter_ns - time.perf_counter_ns()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(left_ns / _NS)
            return
        assert self._rung is None
        self._rung = self._loop.create_future()
        at_s, at_ns = divmod(perf_counter_ns, _NS)
        _LIBC.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(_Spec(0, 0, at_s, at_ns)), None)
        try:
            await self._rung
        finally:
            self._rung = None

    def close(self) -> None:
        """Let go of the timer."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _ring(self) -> None:
        assert self._fd is not None
        os.read(self._fd, 8)
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)


_LIBC = ctypes.CDLL(None)


def _timer() -> int | None:
    """A timer of the clock that `perf_counter` reads; None where there is none."""
    clock = time.get_clock_info("perf_counter").implementation
    if clock != "clock_gettime(CLOCK_MONOTONIC)" or not hasattr(_LIBC, "timerfd_create"):
        return None
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    fd = int(_LIBC.timerfd_create(time.CLOCK_MONOTONIC, flags))
    return fd if fd >= 0 else None

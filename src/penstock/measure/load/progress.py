"""One line on stderr that tells how a load goes; knows rows, and nothing of the terminal's size.

On a terminal the line is refreshed four times a second at most; elsewhere, a line is written now
and then, so that a log shows that it lives.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from penstock.measure import metrics
from penstock.measure.records import Request

_REFRESH_S, _LINE_S = 0.25, 15.0
_RECENT = 50


class Progress:
    """Counts what has ended, and shows it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._shown_s = time.monotonic()
        self._width = 0
        self.begin("")

    def begin(self, stage: str, num: int | None = None) -> None:
        """A stage begins, of `num` requests where that is known."""
        self._stage, self._num = stage, num
        self._done = self._failed = self._tokens = 0
        self._waits: list[float] = []
        self._begun_s = time.monotonic()

    def add(self, row: Request) -> None:
        """A request has ended."""
        self._done += 1
        self._failed += row.error_class not in (None, "cut")
        self._tokens += row.n_out or 0
        if (wait_s := metrics.ttft_s(row)) is not None:
            self._waits = [*self._waits[1 - _RECENT :], wait_s]
        if time.monotonic() - self._shown_s >= (_REFRESH_S if self._live else _LINE_S):
            self._show(self.line())

    def line(self) -> str:
        """What is shown."""
        elapsed_s = max(1e-9, time.monotonic() - self._begun_s)
        of = f"/{self._num}" if self._num else ""
        parts = [f"{self._stage or 'load'}: {self._done}{of} ended in {elapsed_s:.0f} s"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        parts.append(f"{self._tokens / elapsed_s:.0f} tokens/s")
        if self._waits:
            parts.append(f"ttft {metrics.quantile(self._waits, 0.5) * 1e3:.0f} ms")
        return ", ".join(parts)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
        self._width = 0

    def _show(self, line: str) -> None:
        self._shown_s = time.monotonic()
        if not self._live:
            self._stream.write(line + "\n")
        else:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = max(self._width, len(line))
        self._stream.flush()

"""How far a long work on bytes is: a bar on a terminal, a line now and then in a log.

Owns what is shown. Knows not what the work is. Threads may add at the same time.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger("penstock.hub")

_SHOWN_AFTER_S = 1.0
_LINE_EVERY_S = 10.0


def tell(line: str) -> None:
    """Say a line: to the log where one is configured for it, else on stderr."""
    if logger.hasHandlers():
        logger.info(line)
    else:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def in_units(num_bytes: float) -> str:
    """A number of bytes as people read it, in powers of ten, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


class Progress:
    """Bytes done of a known number. Use it with `with`."""

    def __init__(self, what: str, total_bytes: int, done_bytes: int = 0) -> None:
        """Args:
        what: is done, such as `downloading org/name`.
        total_bytes: in all.
        done_bytes: of them before now.
        """
        self._what, self._total_bytes = what, total_bytes
        self._first_bytes = self._done_bytes = done_bytes
        self._lock = threading.Lock()
        self._started = self._told = time.monotonic()
        self._bar = _bar(what, total_bytes, done_bytes)

    def add(self, num_bytes: int) -> None:
        """So many more are done; fewer if it is negative, when something has to be done anew."""
        with self._lock:
            self._done_bytes += num_bytes
            if self._bar is not None:
                self._bar.update(num_bytes)
            elif (now := time.monotonic()) - self._told >= _LINE_EVERY_S:
                self._told = now
                tell(self._line(now))

    def _line(self, now: float) -> str:
        rate = max(self._done_bytes - self._first_bytes, 0) / max(now - self._started, 1e-3)
        share = 100 * self._done_bytes / max(self._total_bytes, 1)
        return (
            f"{self._what}: {share:.0f} % ({in_units(self._done_bytes)} of "
            f"{in_units(self._total_bytes)}, {in_units(rate)}/s)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(what: str, total_bytes: int, done_bytes: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # the base install: lines will do
        return None
    return tqdm(
        desc=what,
        total=total_bytes,
        initial=done_bytes,
        unit="B",
        unit_scale=True,
        delay=_SHOWN_AFTER_S,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    )

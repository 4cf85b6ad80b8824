"""Ctrl-C and SIGTERM end an evaluation, also where it blocks the event loop.

Both cancel the task that evaluates: what is in flight is written, engines are ended, figures are
made of what is there. Knows no evaluation.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self


class Stopping:
    """Within it SIGTERM cancels the current task, as asyncio lets Ctrl-C do. Main thread only."""

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._is_blocked = False
        self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Within it no event loop runs, which would have to cancel: both break in at once."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self._is_blocked = True
        try:
            yield
        finally:
            self._is_blocked = False
            signal.signal(signal.SIGINT, before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._is_blocked:
            raise asyncio.CancelledError
        self._loop.call_soon_threadsafe(self._task.cancel)

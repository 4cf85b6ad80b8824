"""A process with a time limit, whose group ends with it: nothing that it started outlives it.

Owns the ending. What a process says on stdout goes to the caller line by line, what it says on
stderr into a log whose end explains a failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

GRACE_S = 5.0  # between the request to end and the end


class Ended(NamedTuple):
    """How a process ended."""

    seconds: float
    problem: str | None  # None: it returned 0


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    limit_s: float,
    on_line: Callable[[str], None] = lambda line: None,
    directory: Path | None = None,
) -> Ended:
    """Run a command to its end or its limit.

    Args:
        log: takes its stderr.
        on_line: is called with each line of its stdout.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    with _limited(process, limit_s) as timed_out:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                on_line(line.rstrip("\n"))
        status = process.wait()
    seconds = time.monotonic() - started_s
    if timed_out.is_set():
        return Ended(seconds, f"stopped after its {limit_s:.0f} s")
    if status:
        return Ended(seconds, f"ended with status {status}: {last_line(log)}")
    return Ended(seconds, None)


@contextmanager
def _limited(process: subprocess.Popen[str], limit_s: float) -> Iterator[threading.Event]:
    """Ends the process and all of its group after `limit_s`, and in any case with the block.

    Yields:
        what is set once the time was up.
    """
    timed_out, is_over = threading.Event(), threading.Event()

    def stop() -> None:
        timed_out.set()
        _signal(process.pid, signal.SIGTERM)
        if not is_over.wait(GRACE_S):
            _signal(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(limit_s, 0.0), stop)
    timer.daemon = True
    timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()
        is_over.set()
        _signal(process.pid, signal.SIGKILL)  # also what it may have left behind
        process.wait()


def end_on_term() -> None:
    """Let SIGTERM raise SystemExit here, so that the processes that `run` started end with us."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def last_line(log: Path) -> str:
    """The last that a process said."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)

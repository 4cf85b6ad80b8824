"""The driver's half of the conversation: one worker process, paused unless it is asked.

Owns the process, its pipes, its time limits and its peak memory. Knows no engine.
Invariant: between calls the worker's threads do not run, so that none disturbs another's figure;
an engine's threads may spin while they wait.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

LOG_TAIL = 2000  # characters of the log that an unexpected end is explained with


class WorkerFailed(Exception):
    """The worker cannot do what it was asked: a sentence that goes into the results."""


class Worker:
    """One engine's process.

    Args:
        command: what starts it.
        environment: its environment variables, all of them.
        log: where its stderr goes, appended.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._stderr: IO[bytes] = log.open("ab")
        self.started_s = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of its own."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there to be asked."""
        return self._process.poll() is None

    def call(self, op: str, *, limit_s: float, **arguments: Any) -> Any:
        """Ask and wait.

        Raises:
            WorkerFailed: it answered with an error, ended, or took longer than `limit_s`, after
                which it is ended.
        """
        if not self.alive:
            raise WorkerFailed(f"the process ended with {self._process.returncode}")
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            reply = json.loads(self._read_line(time.monotonic() + limit_s, limit_s))
        except BrokenPipeError:
            raise WorkerFailed(self._last_words()) from None
        self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply["result"]

    def peak_rss_bytes(self) -> int:
        """The most memory that was resident, of the process and its children together."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) != self._process.pid:
                    continue
                text = status.read_text()
            except (ProcessLookupError, FileNotFoundError):
                continue
            lines = [line for line in text.splitlines() if line.startswith("VmHWM:")]
            total += sum(int(line.split()[1]) * 1024 for line in lines)
        return total

    def close(self) -> None:
        """End the process and whatever it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    def _read_line(self, deadline: float, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([file], [], [], left_s)[0]:
                self._signal(signal.SIGKILL)
                self._process.wait()
                raise WorkerFailed(f"no answer within {limit_s:.0f} s")
            piece = os.read(file, 1 << 16)
            if not piece:
                raise WorkerFailed(self._last_words())
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        tail = self._log.read_text(errors="replace")[-LOG_TAIL:].strip().splitlines()
        return f"the process ended with {code}: {tail[-1] if tail else 'it said nothing'}"

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

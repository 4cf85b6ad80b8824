"""One engine's process: started, waited for, ended with everything that it started itself.

Owns a process that leads a session of its own. Knows HTTP as far as "does it say 200".
Invariant: when `end` returns nothing of it runs, and what it wrote is in its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.errors import ConfigError, PenstockError

if TYPE_CHECKING:
    import psutil

_POLL_S = 0.01
_PROBE_TIMEOUT_S = 5.0
_TERMINATE_S = 15.0  # an engine may wait for its own children; then it is killed
_KILL_S = 5.0
_NUM_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
# An engine that is started here is ours alone on loopback: it needs no key, and gets none,
# whatever the user's variable is called (`--api-key-env`).
_SECRET = re.compile(r"(^|_)(API_?KEY|SECRET|ACCESS_KEY|TOKEN|PASSWORD)$", re.IGNORECASE)
_FAMILY = "PENSTOCK_MEASURED_ENGINE"  # a variable by which an engine's own children are known
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class EngineFailed(PenstockError):
    """An engine did not start, died, or does not answer; the hint has the end of its log."""


@contextlib.contextmanager
def sigterm_cancels() -> Iterator[None]:
    """SIGTERM cancels the task that is within, as Ctrl-C does, so that engines are ended."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class EngineProcess:
    """An engine that was started. The log is appended to: an arm may start more than once."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it.

        Raises:
            ConfigError: the program cannot be executed, or the log cannot be written.
        """
        self.name, self.log = name, log
        self._family = secrets.token_hex(16)
        inherited = {key: told for key, told in os.environ.items() if not _SECRET.search(key)}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                output.write(f"$ {' '.join(command)}\n".encode())
                output.flush()
                self._log_start = output.tell()
                self._spawned_s = time.perf_counter()
                self._process = subprocess.Popen(
                    command,
                    env=inherited | dict(environment) | {_FAMILY: self._family},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the terminal is ours to handle
                    preexec_fn=_die_with_parent,
                )
        except OSError as error:
            raise ConfigError(
                f"The engine `{name}` cannot be started: `{error.filename}`: {error.strerror}.",
                hint="a script says in its first line what runs it; is that there?",
            ) from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def tail(self) -> str:
        """The last lines that it wrote since this start."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - 16384))
            lines = file.read().decode("utf-8", "replace").splitlines()
            return "\n".join(lines[-_NUM_TAIL_LINES:])
        return ""

    async def ready(self, host: str, port: int, path: str, timeout_s: float) -> dict[str, float]:
        """Wait until it answers `path` with 200: seconds until the port was open, and from then.

        Raises:
            EngineFailed: it ended, or was not ready in time.
        """
        try:
            async with asyncio.timeout(self._spawned_s + timeout_s - time.perf_counter()):
                while not await _is_open(host, port):
                    await self._pause()
                open_s = time.perf_counter()
                while await _status(host, port, path) != 200:
                    await self._pause()
        except TimeoutError:
            raise EngineFailed(
                f"The engine `{self.name}` was not ready in {timeout_s:g} s.", hint=self.words()
            ) from None
        if self._process.poll() is not None:  # then somebody else answered at that port
            raise self._dead()
        ready_s = time.perf_counter()
        return {"port_s": open_s - self._spawned_s, "ready_s": ready_s - open_s}

    async def end(self) -> None:
        """End it and all that it started: asked to, then killed."""
        # In a thread, which the interpreter waits for even when this task is cancelled again.
        await asyncio.shield(asyncio.to_thread(self._end))

    async def _pause(self) -> None:
        if self._process.poll() is not None:
            raise self._dead()
        await asyncio.sleep(_POLL_S)

    def _dead(self) -> EngineFailed:
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"status {code}"
        return EngineFailed(
            f"The engine `{self.name}` ended with {how} while it started.", hint=self.words()
        )

    def words(self) -> str:
        """What to say of its log."""
        return f"its log `{self.log}` ends with:\n{self.tail()}"

    def _end(self) -> None:
        import psutil

        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.pid).children(recursive=True)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TERMINATE_S)
        # Whoever is left of its group, or of those it had put into groups of their own.
        self._signal(signal.SIGKILL)
        family += self._orphans()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()  # knows a process that got the number later from the one meant
        self._process.wait(_KILL_S)
        deadline_s = time.monotonic() + _KILL_S
        while any(map(_is_alive, family)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _orphans(self) -> list[psutil.Process]:
        """Those that it started and that outlived it, whoever is their parent now."""
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_FAMILY) == self._family and process.pid != self.pid:
                    found.append(process)
        return found

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that nobody has waited for yet does not."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _die_with_parent() -> None:
    """Runs in the child before the program: even a killed parent leaves no engine behind."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _is_open(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _PROBE_TIMEOUT_S)
    except OSError:
        return False
    writer.close()
    return True


async def _status(host: str, port: int, path: str) -> int:
    """The status of a GET; 0: no answer."""
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
                writer.write(request.encode("ascii"))
                line = await reader.readline()
            finally:
                writer.close()
    except (OSError, ValueError):
        return 0
    parts = line.split()
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0

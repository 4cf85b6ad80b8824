"""A process of ours that works for this one, seen from here: started, read, ended.

Owns the child, this end of the socket to it, and what it writes, which goes on to our stderr. Knows
neither what it does nor its messages, but that there is a first one.
Invariant: no wait is without bound, even if something that the child started keeps its output open.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import socket
import subprocess
import sys
import threading

from penstock.errors import ConfigError
from penstock.protocol.frames import frame
from penstock.protocol.reports import ErrorReport

_STATUS_S = 1.0  # a closed socket waits so long for the status and the words that explain it
_KILL_S = 5.0  # how long the system may take for it
_NUM_TAIL_LINES = 12


class Child:
    """The process is there when the constructor returns; it ends when `socket` is shut down."""

    def __init__(
        self,
        name: str,
        program: list[str],
        first: object,
        environment: dict[str, str],
        prefix: str = "",
    ) -> None:
        """Start it and send it the first message.

        Args:
            name: as a sentence about it begins.
            program: a module and its arguments, which follow the file descriptor of its socket.
            first: a message.
            environment: the child's.
            prefix: goes before each line that it writes.

        Raises:
            ConfigError: a name in the message is not UTF-8. Nothing was started.
        """
        try:
            message = frame(first)
        except UnicodeEncodeError as error:
            told = error.object.encode(errors="backslashreplace").decode()
            raise ConfigError(
                f"`{told}` is not UTF-8, and no message to another process can hold it.",
                hint="rename it, or make a link to it",
            ) from error
        self._name = name
        self._tail: collections.deque[str] = collections.deque(maxlen=_NUM_TAIL_LINES)
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                fd = theirs.fileno()
                self.process = subprocess.Popen(
                    # -P: `-m` would else let the working directory come before the packages
                    [sys.executable, "-P", "-m", program[0], str(fd), *program[1:]],
                    pass_fds=[fd],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
                )
        except BaseException:
            self.socket.close()
            raise
        self._forwarder = threading.Thread(target=self._forward, args=(prefix,), daemon=True)
        self._forwarder.start()
        with contextlib.suppress(ConnectionError):  # it ended already: `death` says how
            self.socket.sendall(message)

    def death(self, *, is_loading: bool) -> ErrorReport:
        """How it ended, now that its socket is closed; while it was loading, also its last words.

        Afterwards clients read this, and what it wrote may quote a prompt of another.
        """
        hint = None
        try:
            status = self.process.wait(_STATUS_S)
        except subprocess.TimeoutExpired:
            text = f"{self._name} closed its connection."
        else:
            text = f"{self._name} ended with exit code `{status}`."
            if status < 0:
                text = f"{self._name} was killed by `{_name_of(-status)}`."
            if status == -signal.SIGKILL:
                hint = "the kernel kills so when memory runs out: look into its log"
            self._forwarder.join(_STATUS_S)
        if is_loading and self._tail:
            text += " Its last output:\n" + "\n".join(self._tail)
        return ErrorReport("EngineDead", text, hint)

    def end(self, timeout_s: float) -> None:
        """Wait for its end, and kill it if it takes longer than this."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_KILL_S)
        self._forwarder.join(_STATUS_S)

    def _forward(self, prefix: str) -> None:
        """Pass on what it writes, and keep the end of it."""
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                text = line.decode(errors="replace")
                self._tail.append(text.rstrip()[:500])
                with contextlib.suppress(ValueError, OSError):  # our stderr is closed
                    sys.stderr.write(prefix + text)


def _name_of(number: int) -> str:
    """`SIGKILL`; the signals for real time have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

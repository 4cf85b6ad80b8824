"""The client of an engine in a process of its own; `engine.worker` is what that process runs.

Owns the child and the parent's end of the socket to it. The child is started by the constructor,
so that it loads while its parent still imports; the parent never imports torch.
Invariant: neither outlives the other by much. The child ends when the socket closes, whatever it
is doing; when the child ends, every open request gets an error that says how.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from typing import IO, final

import msgspec

from penstock.engine import worker
from penstock.engine.client import StreamingClient
from penstock.engine.config import EngineConfig
from penstock.engine.loop import Command, Submit, Update
from penstock.engine.worker import Reply, Started, refusal
from penstock.hardware import TERMINAL
from penstock.protocol.frames import Frames, frame
from penstock.protocol.reports import ErrorReport

ENGINE_CORE = "penstock.engine.core:EngineCore.from_config"

_EXIT_S = 5.0  # how long the child may take to end before it is killed
_STATUS_S = 0.05  # how long a closed socket waits for the status that explains it
_NUM_TAIL_LINES = 12


@final
class ProcessClient(StreamingClient, asyncio.Protocol):
    """An engine in a child process."""

    def __init__(self, config: EngineConfig, *, core: str = ENGINE_CORE) -> None:
        """Start the child, which begins to load; `start` waits for it.

        Args:
            config: the engine's settings.
            core: `module:function` that makes the engine from the settings, in the child.
        """
        super().__init__()
        self._socket, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            arguments = [worker.__name__, str(fd), core, repr(time.monotonic())]
            self._child = subprocess.Popen(
                # -P: `-m` would else let the working directory come before the installed packages
                [sys.executable, "-P", "-m", *arguments],
                pass_fds=[fd],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
        with contextlib.suppress(ConnectionError):  # it ended already: `start` says how
            self._socket.sendall(frame(config))
        self._tail: collections.deque[str] = collections.deque(maxlen=_NUM_TAIL_LINES)
        self._forwarder = threading.Thread(target=self._forward, daemon=True)
        self._forwarder.start()
        self._frames = Frames()
        self._decoder = msgspec.msgpack.Decoder[Reply](Reply)
        self._transport: asyncio.Transport | None = None
        self._burial: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    async def start(self) -> None:
        """Wait until the child has loaded the model. Raises what loading raises there."""
        loaded, loop = self._expect_start(), asyncio.get_running_loop()
        if not self._is_over:
            self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._socket)
        await loaded

    async def shutdown(self) -> None:
        """End the child, killing it if it does not end by itself; open requests get an error."""
        self._die(ErrorReport("EngineDead", "The engine was shut down."))
        if self._transport is None:
            self._socket.close()
        else:
            self._transport.abort()
        await asyncio.to_thread(self._end_child)
        if self._burial is not None:
            await self._burial

    # --- asyncio.Protocol: called on the event loop ---

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._receive(self._decoder.decode(message))

    def connection_lost(self, exc: Exception | None) -> None:
        self._burial = asyncio.get_running_loop().create_task(self._bury())

    # --- the parent's side ---

    def _send(self, command: Command) -> None:
        assert self._transport is not None
        try:
            message = frame(command)
        except (TypeError, ValueError, OverflowError) as error:  # what msgpack cannot hold
            raise refusal(error, _unsendable(command)) from error
        self._transport.write(message)

    def _receive(self, reply: Reply) -> None:
        if isinstance(reply, Update):
            self._update(reply)
        elif isinstance(reply, Started):
            self._started(reply.info, reply.stats)
        else:
            self._die(reply.report)

    async def _bury(self) -> None:
        self._die(await asyncio.to_thread(self._cause_of_death))

    def _cause_of_death(self) -> ErrorReport:
        """How the child ended; while it was loading, also its last words.

        Afterwards clients read this, and what the child wrote may quote a prompt of another.
        """
        assert self._loaded is not None
        hint = None
        try:
            status = self._child.wait(_STATUS_S)
        except subprocess.TimeoutExpired:
            text = "The engine process closed its connection."
        else:
            text = f"The engine process ended with exit code `{status}`."
            if status < 0:
                text = f"The engine process was killed by `{signal.Signals(-status).name}`."
            if status == -signal.SIGKILL:
                hint = "the kernel kills so when memory runs out: look into its log"
            self._forwarder.join(_STATUS_S)
        if self._tail and not self._loaded.done():
            text += " Its last output:\n" + "\n".join(self._tail)
        return ErrorReport("EngineDead", text, hint)

    def _end_child(self) -> None:
        try:
            self._child.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_EXIT_S)
        self._forwarder.join(_EXIT_S)

    def _forward(self) -> None:
        """Pass on what the child writes, and keep the end of it."""
        output: IO[bytes] | None = self._child.stdout
        assert output is not None
        with output:
            for line in output:
                text = line.decode(errors="replace")
                self._tail.append(text.rstrip()[:500])
                with contextlib.suppress(ValueError, OSError):  # the parent's stderr is closed
                    sys.stderr.write(text)


def _environment() -> dict[str, str]:
    """The child's: with our terminal, if it has a name here (in a container it may have none)."""
    with contextlib.suppress(OSError):
        return os.environ | ({TERMINAL: os.ttyname(2)} if sys.stderr.isatty() else {})
    return dict(os.environ)


def _unsendable(command: Command) -> str:
    """The field of a request that msgpack cannot hold."""
    assert isinstance(command, Submit)
    for owner in (command.request.params, command.request):
        for field in fields(owner):
            try:
                msgspec.msgpack.encode(getattr(owner, field.name))
            except (TypeError, ValueError, OverflowError):
                return field.name
    raise AssertionError("every field can be sent")

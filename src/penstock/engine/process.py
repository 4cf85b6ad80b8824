"""The client of an engine in a process of its own; `engine.worker` is what that process runs.

Owns the child, which the constructor starts, so that it loads while its parent still imports; the
parent never imports torch.
Invariant: neither outlives the other by much. The child ends when the socket closes, whatever it
is doing; when the child ends, every open request gets an error that says how.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import fields
from typing import final

import msgspec

from penstock.engine import worker
from penstock.engine.client import SHUT_DOWN, StreamingClient
from penstock.engine.config import EngineConfig
from penstock.engine.loop import Command, Submit, Update
from penstock.engine.worker import Reply, Started, refusal
from penstock.hardware import TERMINAL
from penstock.protocol.child import Child
from penstock.protocol.frames import Frames, frame

ENGINE_CORE = "penstock.engine.make:make_core"

_EXIT_S = 5.0  # how long the child may take to end before it is killed


@final
class ProcessClient(StreamingClient, asyncio.Protocol):
    """An engine in a child process."""

    def __init__(self, config: EngineConfig, *, core: str = ENGINE_CORE) -> None:
        """Start the child, which begins to load; `start` waits for it.

        Args:
            config: the engine's settings.
            core: `module:function` that makes the engine from the settings, in the child.

        Raises:
            ConfigError: a name in the settings is not UTF-8.
        """
        super().__init__()
        program = [worker.__name__, core, repr(time.monotonic())]
        self._child = Child("The engine process", program, config, _environment())
        self._frames = Frames()
        self._decoder = msgspec.msgpack.Decoder[Reply](Reply)
        self._transport: asyncio.Transport | None = None
        self._burial: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.process.pid

    async def start(self) -> None:
        """Wait until the child has loaded the model. Raises what loading raises there."""
        loaded, loop = self._expect_start(), asyncio.get_running_loop()
        if not self._is_over:
            self._transport, _ = await loop.create_unix_connection(
                lambda: self, sock=self._child.socket
            )
        await loaded

    async def shutdown(self) -> None:
        """End the child, killing it if it does not end by itself; open requests get an error."""
        self._die(SHUT_DOWN)
        if self._transport is None:
            self._child.socket.close()
        else:
            self._transport.abort()
        await asyncio.to_thread(self._child.end, _EXIT_S)
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
        assert self._loaded is not None
        is_loading = not self._loaded.done()
        self._die(await asyncio.to_thread(self._child.death, is_loading=is_loading))


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

"""How the world outside talks to an engine: `EngineClient`, and the client on a thread.

Owns the open requests of one engine and the events that wait for their readers; the engine itself
runs elsewhere (`engine.loop`): on a thread here, in a process of its own in `engine.process`.
Imports no torch until `ThreadClient.start`: a server whose engine is a process lives without it.
Invariant: every request ends with an event that has `finish`, or with an error; its id is free
again only then, so that no late event can reach another request.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol, final

from penstock.engine.config import EngineConfig
from penstock.engine.loop import Abort, Command, Core, EngineLoop, Stop, Submit, Update
from penstock.errors import EngineDead, InvalidField
from penstock.protocol.reports import ErrorReport
from penstock.types import EngineInfo, EngineRequest, EngineStats, TokenEvent

logger = logging.getLogger(__name__)

SHUT_DOWN = ErrorReport("EngineDead", "The engine was shut down.")
_JOIN_S = 10.0  # a step in progress cannot be interrupted; longer is not waited for it


class EngineClient(Protocol):
    """One engine, seen from an event loop."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is. Valid after `start`."""

    @property
    def stats(self) -> EngineStats:
        """The latest figures; the engine sends them along with its events."""

    @property
    def dead(self) -> EngineDead | None:
        """None while the engine can serve; else the error that names why it cannot."""

    @property
    def owed_since_s(self) -> float:
        """`time.monotonic()` when the engine was told what it has not answered yet; now if nothing.

        A request is answered by its first token, and its abort by its end, also when nobody waits.
        """

    async def start(self) -> None:
        """Load the model and begin to step. Raises what loading raises."""

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """Run one request; the last event has `finish`. Closing the iterator aborts it.

        Raises:
            RequestError: the engine refuses the request.
            EngineDead: the engine stopped before the request was done.
        """

    async def shutdown(self) -> None:
        """Stop the engine; open requests get an error."""


class StreamingClient:
    """What every client shares: the open requests, and the life of one request.

    A client gives it `_send`, and calls `_update` and `_die` on the event loop.
    """

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._dead: ErrorReport | None = ErrorReport("EngineDead", "The engine was not started.")
        self._is_over = False  # it has stopped, or will, and `_dead` says why
        self._loaded: asyncio.Future[None] | None = None  # what `start` waits for
        self._streams: dict[str, _Stream] = {}

    @property
    def info(self) -> EngineInfo:
        """What the engine is. Valid after `start`."""
        assert self._info is not None, "the engine was not started"
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The latest figures."""
        return self._stats

    @property
    def dead(self) -> EngineDead | None:
        """None while the engine can serve; else the error that names why it cannot."""
        return None if self._dead is None else EngineDead(self._dead.message, hint=self._dead.hint)

    @property
    def owed_since_s(self) -> float:
        """Since when the engine owes an answer."""
        return min(
            (stream.owed_since_s for stream in self._streams.values()), default=time.monotonic()
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenEvent, None]:
        """Run one request; see `EngineClient.generate`.

        A reader that is slower than the engine gets the tokens of several steps in one event.
        """
        if (dead := self.dead) is not None:
            raise dead
        if not isinstance(request.request_id, str) or request.request_id in self._streams:
            raise InvalidField(
                f"`request_id` is `{request.request_id!r}`; it must be a string not in use.",
                field="request_id",
            )
        self._send(Submit(request))
        stream = self._streams[request.request_id] = _Stream()
        try:
            while not stream.is_read:
                yield await stream.next()
        finally:
            if not stream.is_ended and self._dead is None:
                self._send(Abort(request.request_id))
                stream.owe()

    def _send(self, command: Command) -> None:
        """Hand a command to the engine without waiting."""
        raise NotImplementedError

    def _expect_start(self) -> asyncio.Future[None]:
        """What `start` must wait for; `_started`, `_die` and `_settle` end the wait."""
        assert self._loaded is None, "a client starts once"
        self._loaded = asyncio.get_running_loop().create_future()
        # Whoever awaits `start` may be gone when it fails: then nobody else asks for the error.
        self._loaded.add_done_callback(lambda future: future.cancelled() or future.exception())
        if self._is_over:
            self._settle(self.dead)
        return self._loaded

    def _settle(self, error: Exception | None) -> None:
        """Let `start` return or raise, if it still waits."""
        if self._loaded is None or self._loaded.done():
            return
        if error is None:
            self._loaded.set_result(None)
        else:
            self._loaded.set_exception(error)

    def _started(self, info: EngineInfo, stats: EngineStats) -> None:
        if not self._is_over:  # else it was shut down meanwhile
            self._info, self._stats, self._dead = info, stats, None
            self._settle(None)

    def _update(self, update: Update) -> None:
        """Give the events of one step to their readers."""
        self._stats = update.stats
        for event in update.events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.push(event)
                if event.finish is not None:
                    del self._streams[event.request_id]
        for request_id, report in update.refused.items():
            if (refused := self._streams.pop(request_id, None)) is not None:
                refused.fail(report)

    def _die(self, report: ErrorReport) -> None:
        """The engine has stopped, or will: every open request ends with the first cause."""
        if self._dead is None and report is not SHUT_DOWN:
            logger.error(report.message)
        if self._dead is None or not self._is_over:
            self._dead, self._is_over = report, True
            self._settle(report.error)
        while self._streams:
            self._streams.popitem()[1].fail(self._dead)


class _Stream:
    """The events of one request between the engine and its reader: at most one, merged."""

    __slots__ = ("_error", "_event", "_news", "_owed_since_s", "is_ended")

    def __init__(self) -> None:
        self._owed_since_s: float | None = None
        self.owe()
        self._event: TokenEvent | None = None
        self._error: ErrorReport | None = None
        self._news = asyncio.Event()
        self.is_ended = False  # nothing more will come from the engine

    @property
    def is_read(self) -> bool:
        """Whether the reader has had the last event."""
        return self.is_ended and self._event is None and self._error is None

    @property
    def owed_since_s(self) -> float:
        """Since when the engine owes an answer; now if it owes none."""
        return time.monotonic() if self._owed_since_s is None else self._owed_since_s

    def owe(self) -> None:
        """The engine was told something; an older debt stands."""
        if self._owed_since_s is None:
            self._owed_since_s = time.monotonic()

    def push(self, event: TokenEvent) -> None:
        self._owed_since_s = None
        self._event = event if self._event is None else merge(self._event, event)
        self.is_ended = event.finish is not None
        self._news.set()

    def fail(self, report: ErrorReport) -> None:
        self._error = report
        self.is_ended = True
        self._news.set()

    async def next(self) -> TokenEvent:
        """Wait for tokens. What came before an error is given before the error."""
        await self._news.wait()
        if self._event is None:
            assert self._error is not None
            raise self._error.error
        event, self._event = self._event, None
        if self._error is None:
            self._news.clear()
        return event


def merge(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """Two events of one request, in order, as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return second._replace(
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )


@final
class ThreadClient(StreamingClient):
    """An engine on a thread of this process: for the CPU, where torch gives the GIL away."""

    def __init__(self, source: EngineConfig | Callable[[], Core]) -> None:
        """Nothing is loaded before `start`.

        Args:
            source: the engine's settings, or a function that makes the engine.
        """
        super().__init__()
        self._source = source
        self._engine: EngineLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Load the model on the engine's thread, and begin to step. Raises what loading raises."""
        loaded, loop = self._expect_start(), asyncio.get_running_loop()

        def post(function: Callable[..., None], *args: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(function, *args)

        self._engine = EngineLoop(lambda update: post(self._update, update))
        self._thread = threading.Thread(
            target=self._run,
            args=(self._engine, post),
            name="penstock-engine",
            daemon=True,
        )
        self._thread.start()
        await loaded

    async def shutdown(self) -> None:
        """Stop the engine after its current step; open requests get an error."""
        self._die(SHUT_DOWN)
        if self._thread is not None and self._engine is not None:
            self._engine.send(Stop())
            await asyncio.to_thread(self._thread.join, _JOIN_S)

    def _send(self, command: Command) -> None:
        assert self._engine is not None
        self._engine.send(command)

    def _run(self, engine: EngineLoop, post: Callable[..., None]) -> None:
        """The engine's thread."""
        try:
            core = _load(self._source)
        except Exception as error:  # noqa: BLE001 - `start` raises it
            post(self._settle, error)
            return
        post(self._started, core.info, copy.copy(core.stats))
        try:
            engine.run(core)
        except Exception as error:
            logger.exception("The engine stopped.")
            post(self._die, ErrorReport.of_death(error))


def _load(source: EngineConfig | Callable[[], Core]) -> Core:
    if not isinstance(source, EngineConfig):
        return source()
    from penstock.engine.make import make_core  # numpy, only now

    return make_core(source)

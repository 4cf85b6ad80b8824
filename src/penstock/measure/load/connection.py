"""One HTTP/1.1 connection that says of every piece of an answer when it was read.

Knows bytes and time, not what an answer means, nor where connections come from. The moment is taken
in `data_received`, before anything else; parsing waits in a `Pump` that works in short slices, so
that what one answer says does not delay the reading of another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple, Protocol, cast

import httptools

OnBody = Callable[["Exchange", int, bytes], None]
_now_ns = time.perf_counter_ns


class Failure(StrEnum):
    """Why there is no answer: the `error_class` of a row."""

    CONNECT = "connect"  # no connection, or it closed before the first byte of an answer
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"  # no HTTP/1.1, or it broke off, or is larger than the limits


class HttpError(Exception):
    """There is no whole answer. The message is one sentence."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class Timeouts(NamedTuple):
    """Seconds; None: no limit of its own. `total_s` counts from the wish to connect."""

    connect_s: float = 10.0  # with name and TLS
    first_byte_s: float | None = None  # of the answer, from the sending
    idle_s: float | None = None  # between pieces
    total_s: float = 600.0


class Limits(NamedTuple):
    """The most that an answer may hold."""

    header_bytes: int = 64 * 2**10
    body_bytes: int = 256 * 2**20


class Exchange:
    """One request and its answer; what is known of it stays known when it fails.

    `on_body` gets (this, time.perf_counter_ns() of the read, piece) for each piece of the body, in
    order; `status` and `headers` are set before. What it raises ends the exchange and comes out of
    `send`.
    """

    __slots__ = (
        "connect_s",
        "headers",
        "num_bytes",
        "on_body",
        "resent",
        "status",
        "t_done_ns",
        "t_head_ns",
        "t_sent_ns",
    )

    def __init__(self, on_body: OnBody) -> None:
        self.on_body = on_body
        self.status = 0  # 0: no head yet
        self.headers: dict[str, str] = {}  # names in lower case
        self.connect_s: float | None = None  # None: a connection was there
        self.resent = False  # the server had closed the kept connection; sent once more
        self.num_bytes = 0  # of the body
        self.t_sent_ns: int | None = None  # before its first byte was written, the first time
        self.t_head_ns: int | None = None
        self.t_done_ns: int | None = None  # the last byte of the answer was read


class Pump:
    """Gives what was read to its connections, in slices; reading goes between them."""

    SLICE_NS = 200_000
    MAX_WAITING = 10_000  # beyond, memory matters more than the clock

    def __init__(self) -> None:
        self._waiting: deque[tuple[Connection, int, bytes | None]] = deque()
        self._is_due = False
        self._loop = asyncio.get_running_loop()

    def put(self, connection: Connection, t_ns: int, data: bytes | None) -> None:
        self._waiting.append((connection, t_ns, data))
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        end_ns = _now_ns() + self.SLICE_NS
        waiting = self._waiting
        while waiting:
            connection, t_ns, data = waiting.popleft()
            connection.digest(t_ns, data)
            if _now_ns() > end_ns and len(waiting) < self.MAX_WAITING:
                break
        self._is_due = bool(waiting)
        if waiting:
            self._loop.call_soon(self._run)


class Owner(Protocol):
    """Who keeps the connections: a `Client`."""

    timeouts: Timeouts
    limits: Limits

    def made(self, connection: Connection) -> None: ...

    def keep(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...


class Stale(Exception):
    """The connection closed before one byte of the answer came."""


class Connection(asyncio.Protocol):
    """One connection: an exchange at a time."""

    transport: asyncio.Transport

    def __init__(self, client: Owner, pump: Pump) -> None:
        self._client, self._pump = client, pump
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._read_ns = 0  # when the last bytes came
        self._parser = httptools.HttpResponseParser(self)  # for all answers: no garbage for each

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client.made(self)

    def data_received(self, data: bytes) -> None:
        self._read_ns = t_ns = _now_ns()
        self._pump.put(self, t_ns, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self)
        self._pump.put(self, _now_ns(), None)

    async def exchange(self, exchange: Exchange, request: bytes, begin_ns: int) -> None:
        """Send and wait.

        Raises:
            HttpError, Stale: there is no whole answer.
        """
        self._exchange, self._ended = exchange, self._loop.create_future()
        self._num_head_bytes, self._is_body_until_close = 0, False
        self._num_held_bytes, self._has_progress = 0, False
        self._error: Exception | None = None
        self._is_whole = self._is_reusable = False
        self._timer: asyncio.TimerHandle | None = None
        self._sent_ns = _now_ns()
        self._total_ns = begin_ns + int(self._client.timeouts.total_s * 1e9)
        if exchange.t_sent_ns is None:
            exchange.t_sent_ns = self._sent_ns
        self.transport.write(request)
        self._watch()
        try:
            await self._ended
        except BaseException:
            self.transport.abort()
            raise
        finally:
            self._exchange = None
            if self._timer is not None:
                self._timer.cancel()
        if self._is_reusable:
            self._client.keep(self)
        else:
            self.transport.close()

    def _watch(self) -> None:
        """Fail if a time is over, else look again when the next may be."""
        if self._ended.done():
            return
        timeouts, now_ns = self._client.timeouts, _now_ns()
        due_ns, what = self._total_ns, f"No whole answer within `{timeouts.total_s:g}` s."
        if self._read_ns < self._sent_ns:
            limit_s, since_ns, name = timeouts.first_byte_s, self._sent_ns, "No answer"
        else:
            limit_s, since_ns, name = timeouts.idle_s, self._read_ns, "No more of the answer"
        if limit_s is not None and since_ns + limit_s * 1e9 < due_ns:
            due_ns, what = since_ns + int(limit_s * 1e9), f"{name} within `{limit_s:g}` s."
        if now_ns >= due_ns:
            self._fail(HttpError(Failure.TIMEOUT, what))
        else:
            self._timer = self._loop.call_later((due_ns - now_ns) * 1e-9, self._watch)

    def _fail(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def digest(self, t_ns: int, data: bytes | None) -> None:
        """Parse what was read at `t_ns`; None: the connection is closed."""
        exchange = self._exchange
        if exchange is None or self._ended.done():
            self.transport.abort()  # bytes that nobody asked for
        elif data is None:
            self._closed(exchange, t_ns)
        elif t_ns < self._sent_ns:  # said before the question, such as a 408 for being idle
            self._fail(Stale())
        else:
            self._t_ns, self._has_progress = t_ns, False
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                self._error = self._error or HttpError(
                    Failure.PROTOCOL, f"The answer is not HTTP/1.1: {error}."
                )
            self._judge(exchange, len(data))

    def _judge(self, exchange: Exchange, num_bytes: int) -> None:
        """See whether the exchange has ended, or has to."""
        limit = self._client.limits.header_bytes
        if not exchange.status:  # the parser holds back a header that does not end
            self._num_head_bytes += num_bytes
        # It does the same behind the body, and skips what is said of a chunk beside its size.
        self._num_held_bytes = 0 if self._has_progress else self._num_held_bytes + num_bytes
        if max(self._num_head_bytes, self._num_held_bytes) > limit:
            self._error = HttpError(
                Failure.PROTOCOL, f"The head of the answer has more than `{limit}` bytes."
            )
        if self._error is not None:
            self._fail(self._error)
        elif self._is_whole:
            self._ended.set_result(None)

    def _closed(self, exchange: Exchange, t_ns: int) -> None:
        if exchange.status and self._is_body_until_close:
            exchange.t_done_ns = t_ns
            self._ended.set_result(None)
        elif self._read_ns < self._sent_ns:
            self._fail(Stale())
        else:
            num = exchange.num_bytes
            self._fail(
                HttpError(
                    Failure.PROTOCOL, f"The answer broke off after `{num}` bytes of its body."
                )
            )

    # What the parser calls. Nothing may be raised in them: the parser would hide it.

    def on_message_begin(self) -> None:
        self._is_reusable = False  # true again at its end, unless more follows

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._exchange is not None
        self._num_head_bytes += len(name) + len(value)
        self._has_progress = True
        if self._exchange.status:
            return  # behind the body: it may not change what the head has said
        self._exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        exchange, status = self._exchange, self._parser.get_status_code()
        assert exchange is not None
        if self._is_whole:
            return
        if status < 200:
            exchange.headers.clear()  # of an interim answer, such as 100
            return
        exchange.status, exchange.t_head_ns = status, self._t_ns
        headers = exchange.headers
        self._is_body_until_close = not (
            "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()
        )
        coding = headers.get("content-encoding", "identity")
        if coding != "identity":
            self._error = HttpError(
                Failure.PROTOCOL, f"The answer is compressed (`{coding}`), which was not asked for."
            )

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._has_progress = True
        if self._error is not None or self._is_whole:
            return
        exchange.num_bytes += len(data)
        limit = self._client.limits.body_bytes
        if exchange.num_bytes > limit:
            self._error = HttpError(Failure.PROTOCOL, f"The answer has more than `{limit}` bytes.")
            return
        try:
            exchange.on_body(exchange, self._t_ns, data)
        except Exception as error:  # noqa: BLE001 - it comes out of `send`
            self._error = error

    def on_message_complete(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        if not exchange.status or self._is_whole:
            return  # an interim answer, or one that nobody asked for
        exchange.t_done_ns = self._t_ns
        self._is_whole = True
        self._is_reusable = self._parser.should_keep_alive()

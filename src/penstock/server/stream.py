"""A streamed answer: server-sent events over ASGI.

Owns the order of things on the wire: nothing is sent before the first event is there (an error
until then has its proper status), then events, then exactly one end: `[DONE]` or an error object.
A client that does not read is cut, one that has left ends the call (`Call.interrupt`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.types import Scope, Send

from penstock.errors import PenstockError
from penstock.protocol import sse
from penstock.protocol.openai import Usage
from penstock.server.calls import Call, abort_connection
from penstock.server.failures import ClientGone, SlowReader, describe, to_event
from penstock.server.logs import frames_of
from penstock.server.settings import ServerSettings

logger = logging.getLogger("penstock.server")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass on what comes
]


class EventStream:
    """The answer to a request with `stream`.

    Args:
        pieces: encoded events, one or more in each piece; closed when the stream ends.
        usage: what has been used so far, for the error object of a stream that breaks.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        usage: Callable[[], Usage | None],
        settings: ServerSettings,
    ) -> None:
        self._pieces = pieces
        self._usage = usage
        self._settings = settings
        self._started = False

    async def send_all(self, call: Call, scope: Scope, send: Send) -> None:
        """Stream until the end.

        Raises:
            PenstockError: before anything was sent.
        """
        try:
            async with call.interruptible():
                await self._send_pieces(send)
            # Not interruptible: after this the server says that the client is gone.
            await self._send(send, sse.DONE, more=False)
        except SlowReader as error:
            _cut(call, scope, error)
        except ClientGone as error:
            call.outcome = error.code
        except PenstockError as error:
            if not self._started:
                raise
            await self._send_error(call, scope, error, send)
        except Exception as error:
            if not self._started:
                raise
            details = {"request_id": call.request_id, "error": frames_of(error)}
            logger.error("internal error in a stream", extra=details)
            await self._send_error(call, scope, error, send)

    async def _send_pieces(self, send: Send) -> None:
        first = asyncio.ensure_future(anext(self._pieces, b""))
        try:
            while not first.done():
                await asyncio.wait({first}, timeout=self._settings.keep_alive_s)
                if not first.done():
                    await self._send(send, sse.KEEP_ALIVE)
            await self._send(send, first.result())
            async for piece in self._pieces:
                await self._send(send, piece)
        finally:
            first.cancel()
            await asyncio.wait({first})
            await self._pieces.aclose()

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._settings.slow_reader_timeout_s):
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise SlowReader("The client does not read its stream.") from None

    async def _send_error(self, call: Call, scope: Scope, error: Exception, send: Send) -> None:
        failure = describe(error, call.request_id)
        call.outcome = failure.code
        try:
            await self._send(send, sse.encode(to_event(failure, self._usage())), more=False)
        except SlowReader as slow:
            _cut(call, scope, slow)


def _cut(call: Call, scope: Scope, error: SlowReader) -> None:
    call.outcome = error.code
    abort_connection(scope)  # closing it would wait for the reader

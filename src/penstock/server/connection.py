"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks.

Bounds the bytes and the time that may come without a body, the time that an answer may stay
unread, and the number of connections; gives the application a way to cut a connection whose client
does not read (`penstock.abort`). Invariant: a connection on which nothing moves ends by a timer,
unless a call of the application is under way.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.server.failures import HttpError, describe, to_event
from penstock.server.settings import ServerSettings


class _Pipelined(Exception):
    """A request came while another is being answered; stops the parser."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Made by uvicorn; the limits are set by `bounded_protocol`."""

    settings: ServerSettings

    _num_bare_bytes = 0  # since the message began, its head ended or a piece of its body came
    _got_body = False  # in the bytes that are being parsed
    _in_head = False
    _in_message = False
    _deaf = False  # the answer under way is the last: what comes is dropped
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self.settings.max_connections:
            message = "Too many connections are open."
            self._refuse(HttpError(503, "too_many_connections", message))
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    # --- what comes ---

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        self._got_body = False
        super().data_received(data)
        if self._deaf or self.transport.is_closing():
            return
        if self._in_message:
            self._num_bare_bytes += 0 if self._got_body else len(data)
            self._check_bare_bytes()
        elif not self._is_answering and self._head_timer is None:
            self._start_head_timer()  # bytes that begin no request have stopped uvicorn's timer

    def _check_bare_bytes(self) -> None:
        limit = self.settings.max_header_bytes
        if self._num_bare_bytes > limit:
            what = "head" if self._in_head else "framing"
            message = f"The {what} of the request has more than `{limit}` bytes."
            self._refuse(HttpError(431, "headers_too_large", message))

    def on_message_begin(self) -> None:
        if self._is_answering:
            # uvicorn would stop reading, and not notice any more that the client leaves.
            self._finish()
            raise _Pipelined
        super().on_message_begin()
        self._in_head, self._in_message, self._num_bare_bytes = True, True, 0
        self._start_head_timer()
        self.scope["extensions"] = {"penstock.abort": self.transport.abort}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
        elif not self.transport.is_closing():
            message = "The request has trailers, which are not served."
            self._refuse(HttpError(400, "trailers_not_supported", message))

    def on_headers_complete(self) -> None:
        self._in_head, self._num_bare_bytes = False, 0
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._got_body, self._num_bare_bytes = True, 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    # --- what goes ---

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and not self.transport.is_closing():
            self.transport.close()  # nobody reads the rest of the request
        if self.transport.get_write_buffer_size():
            self._watch_reader(self.transport.get_write_buffer_size())

    def _watch_reader(self, num_unread_bytes: int) -> None:
        """Cut the connection unless its client reads of the answer, which is all written."""
        if self._write_timer is not None:
            self._write_timer.cancel()

        def check() -> None:
            num_left = self.transport.get_write_buffer_size()
            if num_left >= num_unread_bytes:
                self.transport.abort()
            elif num_left:
                self._watch_reader(num_left)

        self._write_timer = self.loop.call_later(self.settings.slow_reader_timeout_s, check)

    def send_400_response(self, msg: str) -> None:
        if not self._deaf:
            self._refuse(HttpError(400, "invalid_http", msg))

    def _refuse(self, error: HttpError) -> None:
        """Answer and close; not into the middle of an answer that has begun."""
        if self._is_answering and self.cycle.response_started:
            self._finish()
            return
        failure = describe(error, "")
        body = to_event(failure, None)
        self.transport.write(
            b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"retry-after: 1\r\nconnection: close\r\n\r\n" % (failure.status, len(body)) + body
        )
        self.transport.close()

    def _finish(self) -> None:
        """Let the answer under way be the last, and take nothing more."""
        self._deaf = True
        self.cycle.keep_alive = False

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        timeout_s = self.settings.header_timeout_s
        self._head_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def bounded_protocol(limits: ServerSettings) -> type[BoundedProtocol]:
    """The protocol class for these settings; uvicorn takes a class."""

    class Configured(BoundedProtocol):
        settings = limits

    return Configured

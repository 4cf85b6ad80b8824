"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks.

Bounds the bytes and the time that the head of a request may take, and the number of connections;
gives the application a way to cut a connection whose client does not read (`penstock.abort`).
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.server.failures import HttpError, describe, to_event
from penstock.server.settings import ServerSettings


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Made by uvicorn; the limits are set by `bounded_protocol`."""

    settings: ServerSettings

    _head_bytes = 0
    _in_head = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self.settings.max_connections:
            message = "Too many connections are open."
            self._refuse(HttpError(503, "too_many_connections", message))
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:  # not complete with these bytes
            self._head_bytes += len(data)
            if self._head_bytes > self.settings.max_header_bytes:
                limit = self.settings.max_header_bytes
                message = f"The head of the request has more than `{limit}` bytes."
                self._refuse(HttpError(431, "headers_too_large", message))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._start_timer()
        self.scope["extensions"] = {"penstock.abort": self.transport.abort}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        timeout_s = self.settings.header_timeout_s
        self._head_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: HttpError) -> None:
        failure = describe(error, "")
        body = to_event(failure, None)
        self.transport.write(
            b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"retry-after: 1\r\nconnection: close\r\n\r\n" % (failure.status, len(body)) + body
        )
        self.transport.close()


def bounded_protocol(limits: ServerSettings) -> type[BoundedProtocol]:
    """The protocol class for these settings; uvicorn takes a class."""

    class Configured(BoundedProtocol):
        settings = limits

    return Configured

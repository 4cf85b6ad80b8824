"""HTTP/1.1 for measuring: the connections to one origin, kept alive and counted.

Knows bytes, not what an answer means; timing is in `connection`. Looking up the name, connecting
and TLS are timed apart from the request. No redirects, no compression, no proxies: nothing between
the clock and the server.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from penstock import __version__
from penstock.errors import ConfigError
from penstock.measure.load.connection import (
    Connection,
    Exchange,
    Failure,
    HttpError,
    Limits,
    Pump,
    Stale,
    Timeouts,
)

_now_ns = time.perf_counter_ns
_RESOLVED_S = 300.0  # how long the addresses of a name are kept


class Client:
    """Connections to one origin. Lives in one event loop; `close` it."""

    def __init__(
        self,
        url: str,
        *,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
        limits: Limits = Limits(),  # noqa: B008 - immutable
        max_connections: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Args:
            url: any URL of the origin.
            max_connections: more requests wait for a place; None: as many as are asked for.
            tls: None: certificates are checked against the system's authorities.

        Raises:
            ConfigError: `url` is not one of http or https.
        """
        self.is_tls, self.host, self.port = origin_of(url)
        self.timeouts, self.limits = timeouts, limits
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self._authority = f"{shown}:{self.port}"
        # Gateways that choose by the name (Envoy) do not know it with the port that goes unsaid.
        is_usual = self.port == (443 if self.is_tls else 80)
        self._host_header = shown if is_usual else self._authority
        self._tls = (tls or ssl.create_default_context()) if self.is_tls else None
        self._places = None if max_connections is None else asyncio.Semaphore(max_connections)
        self._idle: dict[Connection, None] = {}  # the last one used is taken first
        self._open: set[Connection] = set()
        self._addresses: list[str] = []
        self._resolved_s = 0.0
        self._pump: Pump | None = None

    def head(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The head of a request, for `send`; made once for many.

        Raises:
            ConfigError: a header holds a line break, or letters that are not of Latin-1; the path
                holds a space or a control character.
        """
        lines = {
            "Host": self._host_header,
            "User-Agent": f"penstock/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
        } | dict(headers or {})
        if not re.fullmatch(r"/[^\x00-\x20\x7f]*", path):
            raise ConfigError(
                "The path of the URL holds a space or a control character.", hint="write %20"
            )
        for name, value in lines.items():
            if any(mark in name + value for mark in "\r\n\0") or not name.isascii():
                raise ConfigError(
                    f"Header `{name!a}` cannot be sent: it holds a control character."
                )
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        try:
            return f"{method} {path} HTTP/1.1\r\n{text}".encode("latin-1")
        except UnicodeEncodeError:
            raise ConfigError(
                "A header or the path holds a letter that HTTP cannot carry."
            ) from None

    async def send(self, exchange: Exchange, head: bytes, body: bytes = b"") -> None:
        """Send a request and wait for the end of its answer, of whatever status.

        A kept connection that the server has closed before one byte of the answer came is replaced
        once. Being cancelled closes the connection.

        Raises:
            HttpError: there is no whole answer.
        """
        request = b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
        if self._places is None:
            await self._send(exchange, request)
        else:
            async with self._places:
                await self._send(exchange, request)

    async def _send(self, exchange: Exchange, request: bytes) -> None:
        begin_ns = _now_ns()
        connection = self._kept()
        if connection is not None:
            try:
                return await connection.exchange(exchange, request, begin_ns)
            except Stale:
                exchange.resent = True
        connection = await self._connect(exchange)
        try:
            return await connection.exchange(exchange, request, begin_ns)
        except Stale:
            raise HttpError(
                Failure.CONNECT, "The server closed the connection without an answer."
            ) from None

    def _kept(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self, exchange: Exchange) -> Connection:
        begin_ns = _now_ns()
        limit_s = min(self.timeouts.connect_s, self.timeouts.total_s)
        try:
            async with asyncio.timeout(limit_s):
                connection = await self._dial()
        except TimeoutError:
            raise HttpError(Failure.TIMEOUT, f"No connection within `{limit_s:g}` s.") from None
        exchange.connect_s = (_now_ns() - begin_ns) * 1e-9
        return connection

    async def _dial(self) -> Connection:
        """A new connection, to the first address that takes one."""
        loop = asyncio.get_running_loop()
        pump = self._pump = self._pump or Pump()
        failed: OSError = OSError("it has no address")
        for address in await self._resolve():
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self, pump),
                    address,
                    self.port,
                    ssl=self._tls,
                    server_hostname=self.host if self._tls else None,
                )
            except OSError as error:  # an error of TLS is one, too
                failed = error
            else:
                return connection
        self._addresses = []
        raise HttpError(
            Failure.CONNECT, f"`{self._authority}` cannot be reached: {_reason(failed)}."
        )

    async def _resolve(self) -> list[str]:
        """The addresses of the host, looked up once in a while: outside of what is timed."""
        loop = asyncio.get_running_loop()
        if not self._addresses or loop.time() > self._resolved_s + _RESOLVED_S:
            try:
                found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                raise HttpError(
                    Failure.CONNECT, f"`{self.host}` is not known: {_reason(error)}."
                ) from None
            self._addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            self._resolved_s = loop.time()
        return self._addresses

    def keep(self, connection: Connection) -> None:
        """Take a connection back whose answer has ended."""
        self._idle[connection] = None

    def made(self, connection: Connection) -> None:
        self._open.add(connection)

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    async def close(self) -> None:
        """Close all connections; what is under way fails."""
        for connection in list(self._open):
            connection.transport.abort()
        while self._open:  # noqa: ASYNC110 - `connection_lost` comes with the loop's next turns
            await asyncio.sleep(0)


def origin_of(url: str) -> tuple[bool, str, int]:
    """(TLS?, host, port) of a URL.

    Raises:
        ConfigError: it is not one of http or https, or holds a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"`{url.partition('@')[2] or url}` is not a URL: {error}.") from None
    if parts.username or parts.password:
        raise ConfigError(
            "The URL holds a user or a password.", hint="give a key in the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"`{url}` is not a URL of http or https.", hint="such as http://127.0.0.1:8000"
        )
    is_tls = parts.scheme == "https"
    return is_tls, parts.hostname, port or (443 if is_tls else 80)


def _reason(error: Exception) -> str:
    """What the system says of an error, without its number."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).rstrip(".")

"""What a request may look like before anything reads its meaning: host, head, body.

`LimitsMiddleware` checks the head; `BodyMiddleware`, which stands behind authentication, reads the
body whole, within its limits, into `scope["state"]["body"]`. `TextWorkers` keeps slow text work
off the event loop, and bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.server.failures import ClientGone, HttpError, QueueFull
from penstock.server.settings import ServerSettings

T = TypeVar("T")


class LimitsMiddleware:
    """Refuses foreign hosts and large heads.

    Raises (out of the application): HttpError 400, 431.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self._app = app
        self._hosts = settings.hosts()
        self._max_header_bytes = settings.max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check_size(scope)
            if self._hosts is not None:
                self._check_host(scope, self._hosts)
        await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        size = len(scope["path"]) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._max_header_bytes:
            raise HttpError(
                431,
                "headers_too_large",
                f"The head of the request has `{size}` bytes; "
                f"at most `{self._max_header_bytes}` are allowed.",
                close=True,
            )

    def _check_host(self, scope: Scope, hosts: frozenset[str]) -> None:
        values = [value for name, value in scope["headers"] if name == b"host"]
        host = _without_port(values[0].decode("latin-1")).lower() if len(values) == 1 else ""
        if host not in hosts:
            raise HttpError(
                400,
                "host_not_allowed",
                "The request names a host that this server does not serve.",
                hint="use the address of the server, or add the name to `--allowed-hosts`",
                close=True,
            )


def _without_port(host: str) -> str:
    if host.startswith("["):  # [::1]:8000
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class BodyMiddleware:
    """Reads the body of a request.

    Raises (out of the application): HttpError 408, 413, 415, 429; ClientGone.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._max_bodies_bytes = settings.max_bodies_bytes
        self._num_bytes = 0  # of all bodies that are held now
        self._timeout_s = settings.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        pieces: list[bytes] = []
        scope["state"]["body"] = b""
        try:
            if scope["method"] not in ("GET", "HEAD"):  # nothing reads the body of these
                await self._read(scope, receive, pieces)
                scope["state"]["body"] = b"".join(pieces)
            await self._app(scope, receive, send)
        finally:
            self._num_bytes -= sum(map(len, pieces))

    async def _read(self, scope: Scope, receive: Receive, pieces: list[bytes]) -> None:
        """Append the body to `pieces`, which count in the budget of all bodies."""
        headers = dict(scope["headers"])
        self._check_type(scope["method"], headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._receive(receive, pieces)
        except TimeoutError:
            raise HttpError(
                408,
                "body_timeout",
                f"The body did not arrive within `{self._timeout_s:g}` seconds.",
                close=True,
            ) from None

    def _check_type(self, method: str, headers: dict[bytes, bytes]) -> None:
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise HttpError(
                415, "unsupported_encoding", "The body is compressed; send it plain.", close=True
            )
        if method != "POST":
            return
        # A page of another origin may post text/plain without asking; it may not post JSON.
        media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise HttpError(
                415,
                "unsupported_media_type",
                "The body must be JSON.",
                hint="send the header `Content-Type: application/json`",
                close=True,
            )

    async def _receive(self, receive: Receive, pieces: list[bytes]) -> None:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("The client has left.")
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._max_body_bytes:
                raise self._too_large()
            pieces.append(piece)
            self._num_bytes += len(piece)
            if size < self._num_bytes and self._num_bytes > self._max_bodies_bytes:
                raise self._too_many()  # one alone always passes
            if not message.get("more_body", False):
                return

    def _too_many(self) -> HttpError:
        return HttpError(
            429,
            "too_many_bodies",
            f"The bodies of the open requests have more than `{self._max_bodies_bytes}` bytes.",
            hint="come again, or raise `--max-bodies-bytes`",
            headers={"retry-after": "1"},
            close=True,
        )

    def _too_large(self) -> HttpError:
        return HttpError(
            413,
            "body_too_large",
            f"The body is larger than `{self._max_body_bytes}` bytes.",
            hint="send fewer prompts at once, or raise `--max-body-bytes`",
            close=True,
        )


class TextWorkers:
    """Threads for work on text that may take long: parsing, tokenizing, rendering."""

    def __init__(self, num_threads: int, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="penstock-text")
        self._max_waiting = num_threads + max_waiting
        self.num_waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread.

        Raises:
            QueueFull: too much work waits already.
        """
        if self.num_waiting >= self._max_waiting:
            raise QueueFull("Too many texts wait to be tokenized.", retry_after_s=1)
        self.num_waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        # Counted until the thread is done, also if the caller has left.
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def _done(self, future: asyncio.Future[T]) -> None:
        self.num_waiting -= 1
        if not future.cancelled():
            future.exception()  # seen: a caller that left does not ask for it

    def close(self) -> None:
        """Take no more work; what runs may end by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

"""One HTTP request on its way: `Call`, and the middleware that opens, watches and closes it.

Owns the request id, the log line, the metrics of the request, the deadline and the watch for a
client that leaves. Every way to end a request early is one: `Call.interrupt(error)`.
Invariant: every request that reaches the application ends in exactly one outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.errors import PenstockError
from penstock.server.failures import ClientGone, DeadlineExceeded, describe, to_response
from penstock.server.logs import frames_of
from penstock.server.metrics import Metrics

logger = logging.getLogger("penstock.server")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}\Z")


class Call:
    """One HTTP request. Lives in `scope["state"]["call"]`; used in its own event loop only."""

    __slots__ = (
        "_error",
        "_task",
        "num_answers",
        "finish",
        "first_token_s",
        "last_token_s",
        "method",
        "num_cached_tokens",
        "num_completion_tokens",
        "num_prompt_tokens",
        "outcome",
        "path",
        "queue_s",
        "request_id",
        "route",
        "started_s",
        "status",
        "user",
    )

    def __init__(self, request_id: str, method: str, path: str) -> None:
        self.request_id = request_id
        self.method = method
        self.path = path
        self.route = "other"  # bounded: the label of metrics
        self.started_s = time.monotonic()
        self.status = 0
        self.outcome = "ok"
        self.finish: str | None = None
        self.user: str | None = None  # digest
        self.num_answers = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_completion_tokens = 0
        self.queue_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._error: PenstockError | None = None
        self._task: asyncio.Task[object] | None = None  # within an interruptible block

    def interrupt(self, error: PenstockError) -> None:
        """End the call with `error`: at once within `interruptible`, else when it gets there."""
        if self._error is not None:
            return
        self._error = error
        if self._task is not None:
            self._task.cancel()

    @property
    def error(self) -> PenstockError | None:
        """What ended the call early."""
        return self._error

    def interruptible(self) -> _Interruptible:
        """A block (`async with`) that `interrupt` ends; its error comes out of the block."""
        return _Interruptible(self)


class _Interruptible:
    """Turns the cancellation that `Call.interrupt` asks for into its error, as asyncio.timeout."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def __aenter__(self) -> None:
        if self._call.error is not None:
            raise self._call.error
        task = asyncio.current_task()
        assert task is not None
        self._num_cancels = task.cancelling()
        self._call._task = task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        task, self._call._task = self._call._task, None
        assert task is not None
        if self._call.error is None:
            return
        cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        if not cancelled:  # the block was done first: the cancellation is still on its way
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        if task.uncancel() <= self._num_cancels and cancelled:
            raise self._call.error from None


class CallMiddleware:
    """The outermost layer: gives every request its `Call`, and every error its answer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        routes: frozenset[str],
        request_timeout_s: float | None,
        log_requests: bool,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._request_timeout_s = request_timeout_s
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call(_request_id(scope), scope["method"], scope["path"])
        scope.setdefault("state", {})["call"] = call
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                call.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", call.request_id.encode()),
                ]
            await send(message)

        if call.path in self._routes:
            call.route = call.path
        try:
            async with _deadline(call, self._request_timeout_s):
                await self._app(scope, receive, send_with_id)
        except PenstockError as error:
            await self._fail(call, error, started, scope, receive, send_with_id)
        except asyncio.CancelledError:
            call.outcome = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001 - the border of the process
            logger.error(
                "internal error",
                extra={"request_id": call.request_id, "error": frames_of(error)},
            )
            await self._fail(call, error, started, scope, receive, send_with_id)
        finally:
            self._close(call)

    async def _fail(
        self,
        call: Call,
        error: Exception,
        started: bool,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        failure = describe(error, call.request_id)
        call.outcome = failure.code
        if started:  # too late for an answer: the broken connection says it
            abort_connection(scope)
            return
        await to_response(failure)(scope, receive, send)

    def _close(self, call: Call) -> None:
        self._metrics.observe_call(call)
        if self._log_requests:
            logger.info("request", extra=_log_fields(call))


def abort_connection(scope: Scope) -> None:
    """Break the connection at once, whatever is still to be written.

    Raises:
        RuntimeError: the server below offers no such thing; it breaks the connection for this.
    """
    abort = scope.get("extensions", {}).get("penstock.abort")
    if abort is None:
        raise RuntimeError("The answer had begun and cannot be ended properly.")
    abort()


@contextlib.asynccontextmanager
async def _deadline(call: Call, seconds: float | None) -> AsyncIterator[None]:
    if seconds is None:
        yield
        return
    error = DeadlineExceeded(
        f"The request took longer than `{seconds:g}` seconds.",
        hint="ask for fewer tokens, or raise `--request-timeout-s`",
    )
    timer = asyncio.get_running_loop().call_later(seconds, call.interrupt, error)
    try:
        yield
    finally:
        timer.cancel()


@contextlib.asynccontextmanager
async def watch_client(call: Call, receive: Receive) -> AsyncIterator[None]:
    """Interrupt the call when the client leaves. The body must have been read whole."""
    watch = asyncio.create_task(_until_gone(call, receive))
    try:
        yield
    finally:
        watch.cancel()


async def _until_gone(call: Call, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call.interrupt(ClientGone("The client has left."))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _log_fields(call: Call) -> dict[str, object]:
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "method": call.method,
        "path": call.path[:200],
        "status": call.status,
        "outcome": call.outcome,
        "duration_s": round(time.monotonic() - call.started_s, 6),
    }
    if call.num_answers:
        fields |= {
            "finish": call.finish,
            "num_answers": call.num_answers,
            "prompt_tokens": call.num_prompt_tokens,
            "cached_tokens": call.num_cached_tokens,
            "completion_tokens": call.num_completion_tokens,
            "queue_s": None if call.queue_s is None else round(call.queue_s, 6),
            "ttft_s": None
            if call.first_token_s is None
            else round(call.first_token_s - call.started_s, 6),
            "user": call.user,
        }
    return fields

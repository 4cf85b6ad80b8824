"""Errors that only a server has, and what HTTP says for each error of penstock.

Owns status codes and the machine-readable `code`s. A message tells the user what to change; it
never holds the text of an unexpected exception, which may hold a prompt or an address.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from starlette.responses import Response

from penstock.errors import (
    ContextTooLong,
    EngineDead,
    Overloaded,
    PenstockError,
    RequestError,
    UnknownModel,
)
from penstock.protocol.openai import Error, ErrorResponse, Usage

ENGINE_DEAD_RETRY_S = 10


class HttpError(PenstockError):
    """A request that HTTP itself can refuse, before anything reads its meaning."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        if close:  # the rest of the request has not been read and will not be
            self.headers["connection"] = "close"


class QueueFull(Overloaded):
    """As many requests are open as may be."""


class Draining(Overloaded):
    """The server is about to stop."""


class Cut(PenstockError):
    """An open request is ended by the server. `code` names the reason."""

    code = "cut"


class ClientGone(Cut):
    """The client has left."""

    code = "client_gone"


class DeadlineExceeded(Cut):
    """The request took longer than it may."""

    code = "deadline_exceeded"


class SlowReader(Cut):
    """The client does not read its stream."""

    code = "slow_reader"


class ShuttingDown(Cut):
    """The time to drain is over."""

    code = "shutting_down"


class Failure(NamedTuple):
    """What HTTP says for an error."""

    status: int
    code: str
    error: Error
    headers: dict[str, str]


_INVALID = "invalid_request_error"
_SERVER = "server_error"


def describe(error: Exception, request_id: str) -> Failure:
    """The status, body and headers for an error. What is not ours becomes a plain 500."""
    status, kind, code, param, headers = _classify(error)
    message = "An internal error happened; the log names it under the request id."
    if isinstance(error, PenstockError):
        hint = "" if error.hint is None else f" Hint: {error.hint.rstrip('.')}."
        message = error.message + hint
    body = Error(message=message, type=kind, param=param, code=code, request_id=request_id)
    return Failure(status, code, body, headers)


def _classify(error: Exception) -> tuple[int, str, str, str | None, dict[str, str]]:
    """(status, type, code, param, headers)"""
    match error:
        case HttpError():
            kind = "authentication_error" if error.status == 401 else _INVALID
            return error.status, kind, error.code, None, error.headers
        case UnknownModel():
            return 404, _INVALID, "model_not_found", error.field, {}
        case ContextTooLong():
            return 400, _INVALID, "context_length_exceeded", error.field, {}
        case RequestError():
            return 400, _INVALID, "invalid_value", error.field, {}
        case QueueFull():
            return 429, "rate_limit_error", "queue_full", None, _retry_after(error.retry_after_s)
        case Overloaded():
            return 503, _SERVER, "draining", None, _retry_after(error.retry_after_s)
        case EngineDead():
            return 503, _SERVER, "engine_dead", None, _retry_after(ENGINE_DEAD_RETRY_S)
        case ClientGone():  # nobody reads it; the log does
            return 499, _INVALID, error.code, None, {}
        case DeadlineExceeded():
            return 504, _SERVER, error.code, None, {}
        case Cut():
            return 503, _SERVER, error.code, None, _retry_after(1)
        case _:
            return 500, _SERVER, "internal_error", None, {}


def _retry_after(seconds: int) -> dict[str, str]:
    return {"retry-after": str(max(1, seconds))}


def to_response(failure: Failure) -> Response:
    """The whole answer."""
    return Response(
        msgspec.json.encode(ErrorResponse(error=failure.error)),
        failure.status,
        failure.headers,
        media_type="application/json",
    )


def to_event(failure: Failure, usage: Usage | None) -> bytes:
    """The data of the last event of a stream that had begun."""
    if usage is None:
        return msgspec.json.encode(ErrorResponse(error=failure.error))
    return msgspec.json.encode(ErrorResponse(error=failure.error, usage=usage))

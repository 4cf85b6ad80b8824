"""What the routes that work on text have in common: the two that generate, and those of tokens.

Owns the life of such a call: decoded, perhaps let in by the gate, watched, and let out again
whatever happens. The routes themselves only translate.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    PromptTokensDetails,
    Usage,
)
from penstock.protocol.parse import decode_request
from penstock.server.calls import Call, watch_client
from penstock.server.failures import HttpError
from penstock.server.generation import Tally
from penstock.server.params import digest
from penstock.server.service import Service, body_of, call_of, service_of
from penstock.server.stream import EventStream

T = TypeVar("T", bound=msgspec.Struct)
Serves = Literal["any", "generate", "pooling"]
Answer = Callable[[Service, Call, bytes], Awaitable[Response | EventStream]]

encode_json = msgspec.json.Encoder().encode


class WatchedEndpoint:
    """An ASGI application around a function that answers one route.

    The function ends early if the client leaves or the deadline comes.
    """

    def __init__(self, answer: Answer, *, serves: Serves = "any") -> None:
        """`serves`: which kind of engine the route is for."""
        self._answer = answer
        self._serves = serves

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        service, call = service_of(request), call_of(request)
        _check_kind(service, self._serves)
        try:
            async with watch_client(call, receive):
                async with call.interruptible():
                    response = await self._answer(service, call, body_of(request))
                if isinstance(response, EventStream):
                    await response.send_all(call, scope, send)
                else:
                    await response(scope, receive, send)
        finally:
            service.gate.release(call)


def _check_kind(service: Service, serves: Serves) -> None:
    """Refuse what this server is not for.

    Raises:
        HttpError: 400, with what it is for.
    """
    pooling = service.client.info.pooling
    if serves == "generate" and pooling is not None:
        does = "scores" if pooling.is_classifier else "embeds"
        raise HttpError(
            400,
            "wrong_route",
            f"This server {does} texts with `{service.model_names[0]}` and writes none.",
            hint="use /v1/rerank, /v1/score or /classify"
            if pooling.is_classifier
            else "use /v1/embeddings, /v1/score or /v1/rerank",
        )
    if serves == "pooling" and pooling is None:
        raise HttpError(
            400,
            "wrong_route",
            f"This server writes text with `{service.model_names[0]}`; it embeds and scores none.",
            hint="use /v1/chat/completions, or start it with `--runner pooling`",
        )


async def read(service: Service, cls: type[T], body: bytes) -> T:
    """Decode a request body, a large one in a thread.

    Raises:
        InvalidField: see `decode_request`.
        QueueFull: too many large bodies wait.
    """
    return await service.offload(body, lambda: decode_request(cls, body))


def admit(
    service: Service, call: Call, request: ChatRequest | CompletionRequest, num_answers: int
) -> None:
    """Ask the gate, and note for the log who asks.

    Raises:
        Overloaded, EngineDead, InvalidField: see `Gate.admit`.
    """
    service.gate.admit(call, num_answers)
    call.num_answers = num_answers
    person = request.safety_identifier if isinstance(request, ChatRequest) else None
    call.user = digest(person or request.user)


def usage_of(tally: Tally, call: Call, *, drop_generated: bool = False) -> Usage:
    """The usage so far; the call keeps the numbers for its log line."""
    num_prompt, num_cached, num_generated = tally.total()
    if drop_generated:
        num_generated = 0
    call.num_prompt_tokens = num_prompt
    call.num_cached_tokens = num_cached
    call.num_completion_tokens = num_generated
    return Usage(
        num_prompt, num_generated, num_prompt + num_generated, PromptTokensDetails(num_cached)
    )


def json_response(value: object) -> Response:
    """A 200 with a body of one of the wire types."""
    return Response(encode_json(value), media_type="application/json")


def new_id(prefix: str) -> str:
    """The id of an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"

"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET
from starlette.responses import Response

from penstock.errors import InvalidField
from penstock.protocol import sse
from penstock.protocol.openai import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    Delta,
    StreamOptions,
)
from penstock.server.calls import Call
from penstock.server.generation import Job, Piece, Prompt, Tally, run
from penstock.server.logprobs import chat_logprobs, prompt_logprobs
from penstock.server.params import chat_params, check_context
from penstock.server.prompts import chat_token_ids
from penstock.server.routes.generation import (
    WatchedEndpoint,
    admit,
    encode_json,
    json_response,
    new_id,
    read,
    usage_of,
)
from penstock.server.service import Service
from penstock.server.stream import EventStream
from penstock.text.stream import TokenText
from penstock.types import TokenLogprobs


@dataclass(slots=True)
class _Chat:
    """One chat request on its way."""

    service: Service
    call: Call
    request: ChatRequest
    job: Job
    model: str
    tally: Tally
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=lambda: int(time.time()))


async def _answer(service: Service, call: Call, body: bytes) -> Response | EventStream:
    request = await read(service, ChatRequest, body)
    model = service.check_model(request.model)
    params = await service.offload(body, lambda: chat_params(request, service))
    if params.n > service.settings.max_choices:
        raise InvalidField(
            f"`n` is `{params.n}`; at most `{service.settings.max_choices}` are served.", field="n"
        )
    admit(service, call, request, params.n)
    token_ids = await service.workers.run(lambda: chat_token_ids(request, service))
    old_name = request.max_completion_tokens is None
    limit_field = "max_tokens" if old_name else "max_completion_tokens"
    check_context(len(token_ids), params, service, field="messages", limit_field=limit_field)
    service.gate.charge(call, len(token_ids))
    job = Job(
        prompts=[Prompt(token_ids=token_ids)],
        params=params,
        continues_text=False,
        priority=request.priority or 0,
        salt=request.cache_salt or "",
    )
    chat = _Chat(service, call, request, job, model, Tally(job))
    if request.stream:
        return EventStream(_stream(chat), lambda: usage_of(chat.tally, call), service.settings)
    return await _whole(chat)


endpoint = WatchedEndpoint(_answer, serves="generate")


@dataclass(slots=True)
class _Collected:
    """One answer, as its pieces come."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: str = ""
    stop_reason: int | str | None = None


async def _whole(chat: _Chat) -> Response:
    answers = [_Collected() for _ in range(chat.job.num_answers)]
    about_prompt: list[TokenLogprobs | None] | None = None
    async with aclosing(run(chat.service, chat.call, chat.job)) as pieces:
        async for piece in pieces:
            chat.tally.add(piece)
            answer = answers[piece.answer]
            answer.texts.append(piece.text)
            answer.tokens += _shown_tokens(chat, piece)
            answer.token_ids += piece.token_ids
            about_prompt = about_prompt or piece.prompt_logprobs
            if piece.finish is not None:
                answer.finish, answer.stop_reason = piece.finish, piece.stop_reason
                chat.call.finish = piece.finish
                chat.call.queue_s = piece.usage.queue_s
    request = chat.request
    completion = ChatCompletion(
        id=chat.id,
        created=chat.created,
        model=chat.model,
        choices=[
            ChatChoice(
                index=index,
                message=AnswerMessage("".join(answer.texts)),
                logprobs=chat_logprobs(answer.tokens) if request.logprobs else None,
                finish_reason=answer.finish,
                stop_reason=answer.stop_reason,
                token_ids=answer.token_ids if request.return_token_ids else UNSET,
            )
            for index, answer in enumerate(answers)
        ],
        usage=usage_of(chat.tally, chat.call),
        system_fingerprint=chat.service.fingerprint,
        prompt_logprobs=UNSET
        if about_prompt is None
        else prompt_logprobs(about_prompt, request.prompt_logprobs or 0, chat.service.tokenizer),
        prompt_token_ids=chat.job.prompts[0].token_ids if request.return_token_ids else UNSET,
    )
    return json_response(completion)


def _shown_tokens(chat: _Chat, piece: Piece) -> list[TokenText]:
    """The tokens of a piece that belong to the text: all but an end token that was not asked for.

    Joined they are the answer, but for what a stop string cut away.
    """
    tokens = piece.logprobs or []
    if piece.ended_by_token and not chat.job.params.include_stop_str_in_output:
        return tokens[:-1]
    return tokens


async def _stream(chat: _Chat) -> AsyncGenerator[bytes, None]:
    options = chat.request.stream_options or StreamOptions()
    begun = False
    async with aclosing(run(chat.service, chat.call, chat.job)) as pieces:
        async for piece in pieces:
            chat.tally.add(piece)
            events = [] if begun else _opening(chat, options)
            begun = True
            events += _chunks(chat, piece, options)
            if piece.finish is not None:
                chat.call.finish = piece.finish
                chat.call.queue_s = piece.usage.queue_s
            if events:
                yield b"".join(events)
    usage = usage_of(chat.tally, chat.call)
    if options.include_usage:
        last = ChatChunk(
            id=chat.id,
            created=chat.created,
            model=chat.model,
            choices=[],
            system_fingerprint=chat.service.fingerprint,
            usage=usage,
        )
        yield sse.encode(encode_json(last))


def _opening(chat: _Chat, options: StreamOptions) -> list[bytes]:
    """The chunks that say who speaks, one for each answer."""
    return [
        _chunk(
            chat,
            ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")),
            options,
            opens=index == 0,
        )
        for index in range(chat.job.num_answers)
    ]


def _chunks(chat: _Chat, piece: Piece, options: StreamOptions) -> list[bytes]:
    """The chunks for one piece: its text, then, if it is the last, why it ended."""
    request = chat.request
    tokens = _shown_tokens(chat, piece)
    events = []
    if piece.text or tokens or (request.return_token_ids and piece.token_ids):
        choice = ChatChunkChoice(
            index=piece.answer,
            delta=Delta(content=piece.text),
            logprobs=chat_logprobs(tokens) if request.logprobs else None,
            token_ids=piece.token_ids if request.return_token_ids else UNSET,
        )
        events.append(_chunk(chat, choice, options))
    if piece.finish is not None:
        choice = ChatChunkChoice(
            index=piece.answer,
            delta=Delta(),
            finish_reason=piece.finish,
            stop_reason=UNSET if piece.stop_reason is None else piece.stop_reason,
        )
        events.append(_chunk(chat, choice, options))
    return events


def _chunk(
    chat: _Chat, choice: ChatChunkChoice, options: StreamOptions, *, opens: bool = False
) -> bytes:
    with_ids = opens and chat.request.return_token_ids
    chunk = ChatChunk(
        id=chat.id,
        created=chat.created,
        model=chat.model,
        choices=[choice],
        system_fingerprint=chat.service.fingerprint,
        prompt_token_ids=chat.job.prompts[0].token_ids if with_ids else UNSET,
        usage=usage_of(chat.tally, chat.call)
        if options.continuous_usage_stats
        else None
        if options.include_usage
        else UNSET,
    )
    return sse.encode(encode_json(chunk))

"""POST /v1/completions: text or tokens in, their continuation out.

With `echo` and `logprobs` it reports the prompt's own tokens, as lm-evaluation-harness reads them:
the prompt's tokens, then exactly `max_tokens` of answer (fewer only if the answer ends).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType
from starlette.responses import Response

from penstock.errors import InvalidField
from penstock.protocol import sse
from penstock.protocol.openai import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    StreamOptions,
    Usage,
)
from penstock.server.calls import Call
from penstock.server.generation import Job, Piece, Prompt, Tally, run
from penstock.server.logprobs import completion_logprobs, prompt_logprobs
from penstock.server.params import check_context, completion_params
from penstock.server.prompts import completion_prompts, num_prompts
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
from penstock.text.stream import TokenText, prompt_token_texts
from penstock.types import TokenLogprobs

_SMALL_PROMPT = 256  # tokens whose texts are looked up in the event loop


@dataclass(slots=True)
class _Task:
    """One completion request on its way."""

    service: Service
    call: Call
    request: CompletionRequest
    job: Job
    model: str
    tally: Tally
    id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def drops_answer(self) -> bool:
        """`max_tokens` is 0: one token is computed and not shown."""
        return self.request.max_tokens == 0

    def usage(self) -> Usage:
        return usage_of(self.tally, self.call, drop_generated=self.drops_answer)

    def prompt_of(self, piece: Piece) -> Prompt:
        return self.job.prompts[piece.answer // self.job.params.n]


@dataclass(slots=True)
class _Part:
    """What a piece adds to its choice."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    stop_reason: int | str | None = None
    about_prompt: list[TokenLogprobs | None] | None = None

    def add(self, other: _Part) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.token_ids += other.token_ids
        self.finish, self.stop_reason = other.finish, other.stop_reason
        self.about_prompt = self.about_prompt or other.about_prompt


async def _answer(service: Service, call: Call, body: bytes) -> Response | EventStream:
    request = await read(service, CompletionRequest, body)
    model = service.check_model(request.model)
    params = await service.offload(body, lambda: completion_params(request, service))
    num_answers = num_prompts(request) * params.n
    if num_answers > service.settings.max_choices:
        raise InvalidField(
            f"`prompt` and `n` ask for `{num_answers}` answers; at most "
            f"`{service.settings.max_choices}` are served at once.",
            field="prompt" if params.n == 1 else "n",
            hint="send fewer prompts at once",
        )
    admit(service, call, request, num_answers)
    prompts = await service.offload(body, lambda: completion_prompts(request, service))
    for prompt in prompts:
        check_context(len(prompt.token_ids), params, service, field="prompt")
    service.gate.charge(call, sum(len(prompt.token_ids) for prompt in prompts))
    job = Job(
        prompts=prompts,
        params=params,
        continues_text=True,
        priority=request.priority or 0,
        salt=request.cache_salt or "",
    )
    task = _Task(service, call, request, job, model, Tally(job))
    if request.stream:
        return EventStream(_stream(task), task.usage, service.settings)
    return await _whole(task)


endpoint = WatchedEndpoint(_answer, serves="generate")


async def _parts(task: _Task) -> AsyncGenerator[tuple[Piece, _Part], None]:
    """The pieces with what is to be shown of them: echo comes first, a dropped answer goes."""
    begun: set[int] = set()
    async with aclosing(run(task.service, task.call, task.job)) as pieces:
        async for piece in pieces:
            task.tally.add(piece)
            part = await _echo(task, piece) if piece.answer not in begun else _Part()
            begun.add(piece.answer)
            if piece.finish is not None:
                task.call.finish = piece.finish
                task.call.queue_s = piece.usage.queue_s
                part.finish, part.stop_reason = piece.finish, piece.stop_reason
            if task.drops_answer:
                part.finish, part.stop_reason = part.finish and "length", None
            else:
                part.text += piece.text
                part.tokens += piece.logprobs or []
                part.token_ids += piece.token_ids
            yield piece, part


async def _echo(task: _Task, piece: Piece) -> _Part:
    """What an answer begins with: the prompt, if it was asked for."""
    request, prompt = task.request, task.prompt_of(piece)
    part = _Part()
    if request.prompt_logprobs is not None:
        part.about_prompt = piece.prompt_logprobs
    if not request.echo:
        return part
    part.text = prompt.text or ""
    logprobs = piece.prompt_logprobs
    if request.logprobs is None or logprobs is None:
        return part

    def tokens() -> list[TokenText]:
        top_k = request.logprobs or 0
        kept = [entry and entry._replace(top=entry.top[:top_k]) for entry in logprobs]
        return _prompt_tokens(task, prompt, kept)

    small = len(prompt.token_ids) <= _SMALL_PROMPT
    part.tokens = tokens() if small else await task.service.workers.run(tokens)
    return part


def _prompt_tokens(
    task: _Task, prompt: Prompt, entries: Sequence[TokenLogprobs | None]
) -> list[TokenText]:
    """The tokens of an echoed prompt; offsets count in the text that is echoed.

    A prompt given as text is echoed as it was: with the special tokens spelt out in it, without
    those that were put around it, which take no room.
    """
    num_before, num_after = prompt.affixes
    end = len(prompt.token_ids) - num_after
    hides = not prompt.is_text and task.job.params.skip_special_tokens
    shown: list[TokenText] = []
    for part, hidden, base in (
        (slice(num_before), True, 0),
        (slice(num_before, end), hides, 0),
        (slice(end, None), True, prompt.offset),
    ):
        texts = prompt_token_texts(
            task.service.tokenizer,
            prompt.token_ids[part],
            entries[part],
            skip_special_tokens=hidden,
        )
        shown += [text._replace(offset=base + text.offset) for text in texts]
    return shown


def _choice(task: _Task, index: int, part: _Part, *, opens: bool) -> CompletionChoice:
    request = task.request
    return CompletionChoice(
        index=index,
        text=part.text,
        logprobs=completion_logprobs(part.tokens) if request.logprobs is not None else None,
        finish_reason=part.finish,
        stop_reason=part.stop_reason,
        prompt_logprobs=UNSET
        if part.about_prompt is None
        else prompt_logprobs(
            part.about_prompt, request.prompt_logprobs or 0, task.service.tokenizer
        ),
        token_ids=part.token_ids if request.return_token_ids else UNSET,
        prompt_token_ids=task.job.prompts[index // task.job.params.n].token_ids
        if opens and request.return_token_ids
        else UNSET,
    )


def _completion(
    task: _Task, choices: list[CompletionChoice], usage: Usage | UnsetType | None
) -> Completion:
    return Completion(
        id=task.id,
        created=task.created,
        model=task.model,
        choices=choices,
        system_fingerprint=task.service.fingerprint,
        usage=usage,
    )


async def _whole(task: _Task) -> Response:
    answers = [_Part() for _ in range(task.job.num_answers)]
    async with aclosing(_parts(task)) as parts:
        async for piece, part in parts:
            answers[piece.answer].add(part)
    choices = [_choice(task, index, part, opens=True) for index, part in enumerate(answers)]
    return json_response(_completion(task, choices, task.usage()))


async def _stream(task: _Task) -> AsyncGenerator[bytes, None]:
    options = task.request.stream_options or StreamOptions()
    begun: set[int] = set()
    async with aclosing(_parts(task)) as parts:
        async for piece, part in parts:
            opens = piece.answer not in begun
            begun.add(piece.answer)
            shown = part.text or part.tokens or part.finish is not None
            if not shown and not (task.request.return_token_ids and part.token_ids):
                if opens:
                    begun.discard(piece.answer)
                continue
            usage: Usage | UnsetType | None = None if options.include_usage else UNSET
            if options.continuous_usage_stats:
                usage = task.usage()
            choice = _choice(task, piece.answer, part, opens=opens)
            yield sse.encode(encode_json(_completion(task, [choice], usage)))
    usage = task.usage()
    if options.include_usage:
        yield sse.encode(encode_json(_completion(task, [], usage)))

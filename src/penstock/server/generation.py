"""Runs the answers of one HTTP request on the engine and gives their text as it comes.

Owns the fan-out: prompts times `n` become engine requests, and their pieces come back in one
stream. Knows tokens and text, no wire type. Invariant: when the iterator ends, for whatever
reason, no engine request of it is alive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from penstock.server.calls import Call
from penstock.server.service import Service
from penstock.text.stream import TextStream, TokenText
from penstock.types import EngineRequest, SamplingParams, TokenEvent, TokenLogprobs, Usage

_QUEUE_SIZE = 64  # pieces; then the engine's client merges what it has for a slow reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str | None = None  # what `echo` shows; None: nothing
    is_text: bool = False  # the user gave the text, not token ids
    offset: int = 0  # where the answer begins in the text that token offsets count
    affixes: tuple[int, int] = (0, 0)  # tokens around those of `text`: before it, after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks of the engine. Answer `p * n + i` is the i-th to prompt p."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    continues_text: bool  # the answer goes on from the prompt's text (completions)
    priority: int = 0
    salt: str = ""

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.params.n


class Piece(NamedTuple):
    """What one engine event adds to one answer."""

    answer: int  # its number among the answers of the request
    text: str
    token_ids: list[int]
    logprobs: list[TokenText] | None
    prompt_logprobs: list[TokenLogprobs | None] | None  # in the first piece of a prompt's answers
    usage: Usage
    finish: str | None
    stop_reason: int | str | None
    ended_by_token: bool  # the last of token_ids is an end or stop token without text


class Tally:
    """The usage of a whole request, from the last piece of each answer."""

    def __init__(self, job: Job) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self._n = job.params.n
        self._generated = [0] * job.num_answers
        self._cached = [0] * len(job.prompts)

    def add(self, piece: Piece) -> None:
        """Take note of a piece."""
        self._generated[piece.answer] = piece.usage.num_generated_tokens
        if piece.answer % self._n == 0:  # the others share the prompt and find it cached
            self._cached[piece.answer // self._n] = piece.usage.num_cached_tokens

    def total(self) -> tuple[int, int, int]:
        """(prompt tokens, of them cached, generated tokens); each prompt counts once."""
        return self._num_prompt_tokens, sum(self._cached), sum(self._generated)


class _PromptState:
    """What the answers to one prompt share."""

    def __init__(self) -> None:
        self.computed = asyncio.Event()  # the first answer has begun: its prompt is in the cache
        self.logprobs: list[TokenLogprobs | None] | None = None


async def run(service: Service, call: Call, job: Job) -> AsyncGenerator[Piece, None]:
    """The pieces of all answers, each answer's in order.

    Raises:
        RequestError, EngineDead: as `EngineClient.generate`; the other answers are aborted.
    """
    answers = []
    for number, prompt in enumerate(job.prompts):
        state = _PromptState()
        for sample in range(job.params.n):
            index = number * job.params.n + sample
            answers.append(_run_answer(service, call, job, prompt, index, state))
    if len(answers) == 1:
        async with aclosing(answers[0]):
            async for piece in answers[0]:
                yield piece
        return
    async with aclosing(_merge(answers)) as pieces:
        async for piece in pieces:
            yield piece


async def _run_answer(
    service: Service, call: Call, job: Job, prompt: Prompt, index: int, state: _PromptState
) -> AsyncGenerator[Piece, None]:
    sample = index % job.params.n
    params = job.params.for_sample(sample)
    if sample:
        # The first answer computes the prompt, once; the others find it in the prefix cache.
        await state.computed.wait()
    request = EngineRequest(
        request_id=f"{call.request_id}-{id(call):x}-{index}",
        prompt_token_ids=prompt.token_ids,
        params=params,
        priority=job.priority,
        salt=job.salt,
    )
    stream = TextStream(
        service.tokenizer,
        params,
        prompt_ids=prompt.token_ids if job.continues_text else (),
        offset=prompt.offset,
    )
    clock = _Clock()
    events = service.client.generate(request)
    num_generated = 0
    try:
        async for event in events:
            clock.tick(call)
            if not sample:
                state.logprobs = event.prompt_logprobs or state.logprobs
                state.computed.set()
            piece = _piece(index, stream, event, num_generated, state if clock.is_first else None)
            num_generated = piece.usage.num_generated_tokens
            if piece.finish is not None:
                clock.observe(service, call, piece)
            yield piece
            if piece.finish is not None:
                return
    finally:
        await close(events)


def _piece(
    index: int,
    stream: TextStream,
    event: TokenEvent,
    num_before: int,
    first: _PromptState | None,
) -> Piece:
    delta = stream.push(event)
    num_new = delta.usage.num_generated_tokens - num_before  # fewer, if a stop string cut them
    return Piece(
        index,
        delta.text,
        event.token_ids[:num_new],
        delta.logprobs,
        None if first is None else first.logprobs,
        delta.usage,
        None if delta.finish is None else delta.finish.value,
        delta.stop_reason,
        event.stop_token_id is not None and num_new == len(event.token_ids),
    )


class _Clock:
    """When the tokens of one answer came."""

    def __init__(self) -> None:
        self._first_s: float | None = None
        self._last_s = 0.0
        self.is_first = False  # the latest event was the first

    def tick(self, call: Call) -> None:
        self._last_s = time.monotonic()
        self.is_first = self._first_s is None
        if self._first_s is None:
            self._first_s = self._last_s
            if call.first_token_s is None:
                call.first_token_s = self._last_s

    def observe(self, service: Service, call: Call, piece: Piece) -> None:
        assert self._first_s is not None
        service.metrics.observe_answer(
            piece.finish or "",
            piece.usage.queue_s,
            self._first_s - call.started_s,
            self._last_s - self._first_s,
            piece.usage.num_generated_tokens,
        )


async def _merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """All pieces as they come. The first error ends all sources."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(_QUEUE_SIZE)

    async def pump(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await queue.put(piece)
        except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        num_left = len(tasks)
        while num_left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def close(events: AsyncIterator[TokenEvent]) -> None:
    """Close the iterator of an engine client, which aborts what still runs."""
    if isinstance(events, AsyncGenerator):
        await events.aclose()

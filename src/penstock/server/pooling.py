"""Runs the texts of one HTTP request on an engine that pools.

Owns the way from the texts of a request to token ids, and from these to vectors. Knows no wire
type but the forms in which texts come. Invariant: when `vectors` ends, for whatever reason, no
engine request of it is alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from penstock.errors import InvalidField
from penstock.server.calls import Call
from penstock.server.generation import close
from penstock.server.params import digest
from penstock.server.service import Service
from penstock.text.pooled import Ids, check_truncation, given_ids, text_ids, vector_of
from penstock.types import EngineRequest, PoolingInfo, SamplingParams

if TYPE_CHECKING:
    from penstock.text.pooled import F32

_PARAMS = SamplingParams(max_tokens=1)  # which such an engine does not read

Input = str | list[str | int | list[int]]


def pooling_of(service: Service) -> PoolingInfo:
    """What the engine answers with; the route has made sure that it pools."""
    pooling = service.client.info.pooling
    assert pooling is not None
    return pooling


def input_ids(given: Input, prompt: str, keep: int | None, service: Service) -> list[Ids]:
    """The texts of an `input`: a text, texts, token ids, or lists of token ids.

    Args:
        prompt: put before each text; of token ids none is.
        keep: tokens to keep of each.

    Raises:
        InvalidField: they are empty, mixed, too many, or not of the vocabulary.
        ContextTooLong: one is too long.
    """
    items: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    kinds = {type(item) for item in items}
    if len(kinds) != 1:
        told = "mixes texts, token ids and lists" if items else "is an empty list"
        raise InvalidField(f"`input` {told}.", field="input")
    if kinds == {int}:
        items = [items]  # type: ignore[list-item]
    check_number(len(items), "input", service)

    def found() -> Iterator[Ids]:
        for number, item in enumerate(items):
            field = "input" if len(items) == 1 else f"input[{number}]"
            if isinstance(item, str):
                if not item:
                    raise InvalidField(f"`{field}` is an empty text.", field=field)
                yield one_text(prompt + item, None, keep, field, service)
            else:
                info = service.client.info
                yield given_ids(list(item), info, keep=keep, field=field)  # type: ignore[arg-type]

    return collected(found(), "input", service)


def collected(texts: Iterable[Ids], field: str, service: Service) -> list[Ids]:
    """The texts of one request, tokenized one after the other while the queue could hold them.

    Raises:
        InvalidField: together they have more tokens than it ever holds. One alone always passes.
    """
    limit = service.settings.max_queue_tokens
    found: list[Ids] = []
    num_tokens = 0
    for ids in texts:
        num_tokens += len(ids.token_ids)
        if found and num_tokens > limit:
            raise InvalidField(
                f"`{field}` and what stands around it have more than `{limit}` tokens in all.",
                field=field,
                hint="send fewer texts at once; the limit is `--max-queue-tokens`",
            )
        found.append(ids)
    return found


def check_repeats(first: str, num_pairs: int, field: str, service: Service) -> None:
    """Refuse a text that would be tokenized again and again, for longer than any body.

    Raises:
        InvalidField: its pairs have more characters than a body may have bytes.
    """
    if num_pairs > 1 and len(first) * num_pairs > (limit := service.settings.max_body_bytes):
        raise InvalidField(
            f"`{field}` has `{len(first)}` characters and stands in `{num_pairs}` pairs, which "
            f"have more than `{limit}` in all.",
            field=field,
            hint="shorten it, or send fewer texts at once",
        )


def check_number(number: int, field: str, service: Service) -> None:
    """Refuse more texts than one request may bring.

    Raises:
        InvalidField: there are too many.
    """
    if number > (limit := service.settings.max_inputs):
        raise InvalidField(
            f"`{field}` has `{number}` texts; at most `{limit}` are served at once.",
            field=field,
            hint="send fewer at once; the limit is `--max-inputs`",
        )


def one_text(first: str, second: str | None, keep: int | None, field: str, service: Service) -> Ids:
    """One text or a pair, tokenized; what cannot fit is refused before anybody tokenizes it."""
    if keep is None:
        for text in (first, second or ""):
            service.text_limit.check(len(text.encode(errors="replace")), field)
    return text_ids(service.tokenizer, service.client.info, first, second, keep=keep, field=field)


def kept(num_tokens: int | None, service: Service) -> int | None:
    """See `check_truncation`."""
    return check_truncation(num_tokens, service.client.info)


def admit(service: Service, call: Call, user: str | None, num_texts: int) -> None:
    """Ask the gate for one place, however many texts there are, and note who asks.

    Raises:
        Overloaded, EngineDead: see `Gate.admit`.
    """
    service.gate.admit(call, 1)
    call.num_answers = num_texts
    call.user = digest(user)


async def vectors(
    service: Service, call: Call, texts: Sequence[Ids], fields: Sequence[str]
) -> list[F32]:
    """The engine's answers to some texts, in their order.

    Args:
        fields: what brought each, for sentences.

    Raises:
        QueueFull: the open requests hold too many tokens already.
        RequestError, EngineDead: as `EngineClient.generate`; the other texts are aborted.
        EngineError: an answer is not finite.
    """
    call.num_prompt_tokens = sum(len(ids.token_ids) for ids in texts)
    service.gate.charge(call, call.num_prompt_tokens)
    tasks = [
        asyncio.create_task(_vector(service, call, ids, number, field))
        for number, (ids, field) in enumerate(zip(texts, fields, strict=True))
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _vector(service: Service, call: Call, ids: Ids, number: int, field: str) -> F32:
    events = service.client.generate(
        EngineRequest(
            request_id=f"{call.request_id}-{id(call):x}-{number}",
            prompt_token_ids=ids.token_ids,
            params=_PARAMS,
            second_start=ids.second_start,
        )
    )
    try:
        event = await anext(events)
        call.queue_s = event.usage.queue_s
        call.finish = "pooled"
        service.metrics.observe_pooled(event.usage.queue_s)
        return vector_of(event.vector, field)
    finally:
        await close(events)

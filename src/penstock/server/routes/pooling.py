"""POST /v1/embeddings, /v1/score, /v1/rerank (and /rerank), /classify: texts in, numbers out."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import UNSET
from starlette.responses import Response

from penstock.errors import InvalidField
from penstock.protocol.pooling import (
    Class,
    ClassifyRequest,
    ClassifyResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    PoolingUsage,
    Ranked,
    RerankRequest,
    RerankResponse,
    RerankText,
    Score,
    ScoreRequest,
    ScoreResponse,
)
from penstock.server.calls import Call
from penstock.server.failures import HttpError
from penstock.server.pooling import (
    admit,
    check_number,
    check_repeats,
    collected,
    input_ids,
    kept,
    one_text,
    pooling_of,
    vectors,
)
from penstock.server.routes.generation import WatchedEndpoint, json_response, new_id, read
from penstock.server.service import Service
from penstock.text.pooled import (
    Ids,
    check_dimensions,
    check_scores,
    cut,
    num_pairs,
    pair_scores,
    prompt_of,
)

if TYPE_CHECKING:
    from penstock.text.pooled import F32


async def _embed(service: Service, call: Call, body: bytes) -> Response:
    """One embedding a text."""
    request = await read(service, EmbeddingRequest, body)
    model = service.check_model(request.model)
    pooling = pooling_of(service)
    if pooling.is_classifier:
        raise _wrong_route("scores texts and has no embeddings", "/v1/rerank or /classify")
    check_dimensions(request.dimensions, pooling)
    prompt = prompt_of(request.prompt_name, pooling)
    if request.prompt_name is not None and not _is_text(request.input):
        raise InvalidField("`prompt_name` belongs to texts, not to ids.", field="prompt_name")
    keep = kept(request.truncate_prompt_tokens, service)
    admit(service, call, request.user, _num_inputs(request.input))
    texts = await service.workers.run(lambda: input_ids(request.input, prompt, keep, service))
    found = await vectors(service, call, texts, _fields("input", texts))
    is_base64 = request.encoding_format == "base64"

    def answer() -> Response:
        data = [
            Embedding(index=index, embedding=_encoded(vector, is_base64))
            for index, vector in enumerate(cut(one, request.dimensions, pooling) for one in found)
        ]
        return json_response(EmbeddingResponse(data=data, model=model, usage=_usage(call)))

    return await service.workers.run(answer)


async def _classify(service: Service, call: Call, body: bytes) -> Response:
    """The scores of all labels of each text."""
    request = await read(service, ClassifyRequest, body)
    model = service.check_model(request.model)
    pooling = pooling_of(service)
    if not pooling.is_classifier:
        raise _wrong_route("embeds texts and has no labels", "/v1/embeddings")
    keep = kept(request.truncate_prompt_tokens, service)
    admit(service, call, request.user, _num_inputs(request.input))
    texts = await service.workers.run(lambda: input_ids(request.input, "", keep, service))
    found = await vectors(service, call, texts, _fields("input", texts))
    data = [
        Class(
            index=index,
            label=pooling.labels[int(scores.argmax())],
            probs=scores.tolist(),
            num_classes=pooling.size,
        )
        for index, scores in enumerate(found)
    ]
    return json_response(
        ClassifyResponse(
            id=new_id("classify"),
            created=int(time.time()),
            model=model,
            data=data,
            usage=_usage(call),
        )
    )


async def _score(service: Service, call: Call, body: bytes) -> Response:
    """One score a pair."""
    request = await read(service, ScoreRequest, body)
    model = service.check_model(request.model)
    firsts, first_name = _texts(request, "text_1", "queries")
    seconds, second_name = _texts(request, "text_2", "documents")
    names = first_name, second_name
    keep = kept(request.truncate_prompt_tokens, service)
    num_pairs(len(firsts), len(seconds), names)
    check_number(len(seconds), second_name, service)
    admit(service, call, request.user, len(seconds))
    scores = await _scores(service, call, firsts, seconds, keep, names)
    return json_response(
        ScoreResponse(
            id=new_id("score"),
            created=int(time.time()),
            model=model,
            data=[Score(index=index, score=score) for index, score in enumerate(scores)],
            usage=_usage(call),
        )
    )


async def _rerank(service: Service, call: Call, body: bytes) -> Response:
    """Documents by their scores with one query, the best first; equal ones keep their order."""
    request = await read(service, RerankRequest, body)
    model = service.check_model(request.model)
    documents = [one if isinstance(one, str) else one.text for one in request.documents]
    if (request.top_n or 0) < 0:
        raise InvalidField(f"`top_n` is `{request.top_n}`; it must not be negative.", field="top_n")
    keep = kept(request.truncate_prompt_tokens, service)
    num_pairs(1, len(documents), ("query", "documents"))
    check_number(len(documents), "documents", service)
    admit(service, call, request.user, len(documents))
    names = "query", "documents"
    scores = await _scores(service, call, [request.query], documents, keep, names)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    shows = request.return_documents is not False
    results = [
        Ranked(
            index=index,
            relevance_score=scores[index],
            document=RerankText(text=documents[index]) if shows else UNSET,
        )
        for index in order[: request.top_n or None]
    ]
    return json_response(
        RerankResponse(id=new_id("rerank"), model=model, results=results, usage=_usage(call))
    )


embeddings = WatchedEndpoint(_embed, serves="pooling")
classify = WatchedEndpoint(_classify, serves="pooling")
score = WatchedEndpoint(_score, serves="pooling")
rerank = WatchedEndpoint(_rerank, serves="pooling")


async def _scores(
    service: Service,
    call: Call,
    firsts: list[str],
    seconds: list[str],
    keep: int | None,
    names: tuple[str, str],
) -> list[float]:
    """By the model's classifier, which reads both texts at once, or how alike embeddings are."""
    pooling = pooling_of(service)
    check_scores(pooling)
    fields = [*_fields(names[0], firsts), *_fields(names[1], seconds)]
    behind = fields[len(firsts) :]

    def singles() -> list[Ids]:
        prompt = prompt_of(None, pooling)
        texts = zip([*firsts, *seconds], fields, strict=True)
        found = (one_text(prompt + text, None, keep, field, service) for text, field in texts)
        return collected(found, names[1], service)

    def pairs() -> list[Ids]:
        first = firsts * len(seconds) if len(firsts) == 1 else firsts
        texts = zip(first, seconds, behind, strict=True)
        found = (one_text(one, other, keep, field, service) for one, other, field in texts)
        return collected(found, names[1], service)

    if pooling.is_classifier:
        if len(firsts) == 1:
            check_repeats(firsts[0], len(seconds), names[0], service)
        texts = await service.workers.run(pairs)
        return [float(found[0]) for found in await vectors(service, call, texts, behind)]
    texts = await service.workers.run(singles)
    found = await vectors(service, call, texts, fields)
    return pair_scores(found[: len(firsts)], found[len(firsts) :])


def _texts(request: ScoreRequest, name: str, other: str) -> tuple[list[str], str]:
    """The texts of one side, under one of its two names, and that name."""
    given = {key: value for key in (name, other) if (value := getattr(request, key)) is not None}
    if len(given) != 1:
        told = "both set" if given else "both missing"
        raise InvalidField(f"`{name}` and `{other}` are {told}.", field=name, hint="give one")
    ((key, value),) = given.items()
    return [value] if isinstance(value, str) else value, key


def _fields(name: str, items: Sequence[object]) -> list[str]:
    """The place of each item in the request."""
    return [name] if len(items) == 1 else [f"{name}[{index}]" for index in range(len(items))]


def _is_text(given: str | list[str | int | list[int]]) -> bool:
    return isinstance(given, str) or bool(given and isinstance(given[0], str))


def _num_inputs(given: str | list[str | int | list[int]]) -> int:
    return 1 if isinstance(given, str) or (given and isinstance(given[0], int)) else len(given)


def _encoded(vector: F32, is_base64: bool) -> list[float] | str:
    if not is_base64:
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")


def _usage(call: Call) -> PoolingUsage:
    return PoolingUsage(call.num_prompt_tokens, call.num_prompt_tokens)


def _wrong_route(told: str, routes: str) -> HttpError:
    return HttpError(400, "wrong_route", f"This server {told}.", hint=f"use {routes}")

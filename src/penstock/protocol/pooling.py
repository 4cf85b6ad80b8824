"""The wire types of servers that pool: embeddings, scores of pairs, rankings.

/v1/embeddings is OpenAI's, /v1/score and /classify are vLLM's, /v1/rerank is that of Jina, Cohere
and vLLM. Every field is honoured or refused, as in `penstock.protocol.openai`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from penstock.protocol.parse import not_supported

_NO_PRIORITY = not_supported("texts are computed in the order in which they come")
_NO_CHUNKS = not_supported("texts are never cut into pieces; use `truncate_prompt_tokens`")


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What all have."""

    model: str | None = None  # None: the one that is served
    user: str | None = None  # logged as a digest
    truncate_prompt_tokens: int | None = None  # tokens to keep of each text; -1: all that fit
    priority: Annotated[Any, _NO_PRIORITY] = None


class EmbeddingRequest(_Request, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The body of POST /v1/embeddings."""

    # text, texts, token ids, or lists of token ids; mixing them is an error
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None  # of models made for it
    prompt_name: str | None = None  # one of the checkpoint's prompts, put before each text


class ScoreRequest(_Request, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The body of POST /v1/score: one text to one, one to many, or each to its own."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None  # another name of `text_1`
    documents: str | list[str] | None = None  # and of `text_2`


class RerankText(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A document."""

    text: str


class RerankRequest(_Request, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The body of POST /v1/rerank."""

    query: str
    documents: list[str | RerankText]
    top_n: int | None = None  # 0: all
    return_documents: bool | None = None  # default: true
    rank_fields: Annotated[Any, not_supported("a document has its text alone")] = None
    max_chunks_per_doc: Annotated[Any, _NO_CHUNKS] = None
    max_tokens_per_doc: Annotated[Any, _NO_CHUNKS] = None


class ClassifyRequest(_Request, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The body of POST /classify."""

    input: str | list[str | int | list[int]]  # as of embeddings


class PoolingUsage(msgspec.Struct, frozen=True):
    """The tokens of a request, those around the texts included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """Of one text: numbers, or the base64 of little-endian float32."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to an embedding request, in the order of the texts."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Of one pair."""

    index: int
    object: str = "score"
    score: float


class ScoreResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a score request, in the order of the pairs."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """One document; `index` is its place in the request."""

    index: int
    relevance_score: float
    document: RerankText | UnsetType = UNSET


class RerankResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a ranking request, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PoolingUsage


class Class(msgspec.Struct, frozen=True, kw_only=True):
    """Of one text: its likeliest label and the scores of all labels, in the model's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a classify request, in the order of the texts."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Class]
    usage: PoolingUsage

"""Every field of every request type is honoured, by a test that is named here, or refused with 400.

The tables below are compared with the types, with the official client's own parameters, and with
the tests that exist: a field cannot be added without an entry, nor an entry without its test.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import msgspec
import openai.resources.chat.completions as openai_chat
import openai.resources.completions as openai_completions
import openai.resources.embeddings as openai_embeddings
import pytest
from server_fakes import Harness, error_of

from penstock.protocol.native import DetokenizeRequest, TokenizeRequest
from penstock.protocol.openai import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    ResponseFormat,
    StreamOptions,
)
from penstock.protocol.parse import unsupported_fields
from penstock.protocol.pooling import (
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    RerankText,
    ScoreRequest,
)

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}

SAMPLING = {
    "model": "test_chat.test_model",
    "n": "test_chat.test_n",
    "max_tokens": "test_chat.test_max_tokens",
    "stop": "test_chat.test_stop",
    "stream": "test_stream.test_a_stream_joined_is_the_whole_answer",
    "stream_options": "test_stream.test_usage",
    "seed": "test_chat.test_sampling_fields",
    "temperature": "test_chat.test_sampling_fields",
    "top_p": "test_chat.test_sampling_fields",
    "presence_penalty": "test_chat.test_sampling_fields",
    "frequency_penalty": "test_chat.test_sampling_fields",
    "logit_bias": "test_chat.test_sampling_fields",
    "user": "test_logs.test_users_are_logged_as_digests",
    "top_k": "test_chat.test_sampling_fields",
    "min_p": "test_chat.test_sampling_fields",
    "typical_p": "test_chat.test_sampling_fields",
    "repetition_penalty": "test_chat.test_sampling_fields",
    "min_tokens": "test_chat.test_ignore_eos_and_min_tokens",
    "stop_token_ids": "test_chat.test_stop_token_ids",
    "ignore_eos": "test_chat.test_ignore_eos_and_min_tokens",
    "allowed_token_ids": "test_chat.test_sampling_fields",
    "banned_token_ids": "test_chat.test_sampling_fields",
    "skip_special_tokens": "test_chat.test_skip_special_tokens",
    "include_stop_str_in_output": "test_chat.test_include_stop_str_in_output",
    "prompt_logprobs": "test_chat.test_prompt_logprobs",
    "priority": "test_chat.test_priority",
    "cache_salt": "test_chat.test_cache_salt",
    "return_token_ids": "test_chat.test_return_token_ids",
}
POOLED = {
    "model": "test_pooling.test_model",
    "user": "test_pooling.test_users_are_logged_as_digests",
    "truncate_prompt_tokens": "test_pooling.test_truncation",
}
HONOURED: dict[type[msgspec.Struct], dict[str, str]] = {
    ChatRequest: SAMPLING
    | {
        "messages": "test_chat.test_messages",
        "max_completion_tokens": "test_chat.test_max_tokens",
        "logprobs": "test_chat.test_logprobs",
        "top_logprobs": "test_chat.test_logprobs",
        "response_format": "test_fields.test_values_that_ask_for_nothing",
        "modalities": "test_fields.test_values_that_ask_for_nothing",
        "store": "test_fields.test_values_that_ask_for_nothing",
        "service_tier": "test_fields.test_values_that_ask_for_nothing",
        "tool_choice": "test_fields.test_values_that_ask_for_nothing",
        "add_special_tokens": "test_fields.test_values_that_ask_for_nothing",
        "safety_identifier": "test_logs.test_users_are_logged_as_digests",
        "add_generation_prompt": "test_chat.test_template_options",
        "chat_template_kwargs": "test_chat.test_template_options",
    },
    CompletionRequest: SAMPLING
    | {
        "prompt": "test_completions.test_prompts",
        "echo": "test_completions.test_echo",
        "logprobs": "test_completions.test_logprobs",
        "add_special_tokens": "test_completions.test_add_special_tokens",
    },
    ChatMessage: {
        "role": "test_chat.test_messages",
        "content": "test_chat.test_messages",
        "name": "test_chat.test_messages",
        "type": "test_chat.test_messages_as_lm_evaluation_harness_sends_them",
    },
    ContentPart: {"type": "test_chat.test_messages", "text": "test_chat.test_messages"},
    StreamOptions: {
        "include_usage": "test_stream.test_usage",
        "continuous_usage_stats": "test_stream.test_continuous_usage",
    },
    ResponseFormat: {"type": "test_fields.test_values_that_ask_for_nothing"},
    EmbeddingRequest: POOLED
    | {
        "input": "test_pooling.test_inputs",
        "encoding_format": "test_pooling.test_encoding_formats",
        "dimensions": "test_pooling.test_dimensions",
        "prompt_name": "test_pooling.test_prompts",
    },
    ScoreRequest: POOLED
    | {
        "text_1": "test_pooling.test_scores",
        "text_2": "test_pooling.test_scores",
        "queries": "test_pooling.test_scores",
        "documents": "test_pooling.test_scores",
    },
    RerankRequest: POOLED
    | {
        "query": "test_pooling.test_ranking",
        "documents": "test_pooling.test_ranking",
        "top_n": "test_pooling.test_ranking",
        "return_documents": "test_pooling.test_ranking",
    },
    RerankText: {"text": "test_pooling.test_ranking"},
    ClassifyRequest: POOLED | {"input": "test_pooling.test_labels"},
    TokenizeRequest: {
        "model": "test_tokens.test_model",
        "prompt": "test_tokens.test_tokenize",
        "messages": "test_tokens.test_messages",
        "add_special_tokens": "test_tokens.test_tokenize",
        "add_generation_prompt": "test_tokens.test_messages",
        "chat_template_kwargs": "test_tokens.test_messages",
        "return_token_strs": "test_tokens.test_tokenize",
    },
    DetokenizeRequest: {
        "model": "test_tokens.test_model",
        "tokens": "test_tokens.test_detokenize",
    },
}
# A body for each type in which a field can be put, and the path of the field in it.
BODIES: dict[type[msgspec.Struct], tuple[str, Any, str]] = {
    ChatRequest: (CHAT, lambda f: {"messages": [USER], **f}, ""),
    CompletionRequest: (COMPLETIONS, lambda f: {"prompt": "Hi", **f}, ""),
    ChatMessage: (CHAT, lambda f: {"messages": [USER, USER | f]}, "messages[1]."),
    ContentPart: (
        CHAT,
        lambda f: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"} | f]}]},
        "messages[0].content[0].",
    ),
    StreamOptions: (
        CHAT,
        lambda f: {"messages": [USER], "stream": True, "stream_options": f},
        "stream_options.",
    ),
    ResponseFormat: (
        CHAT,
        lambda f: {"messages": [USER], "response_format": {"type": "text", **f}},
        "response_format.",
    ),
    EmbeddingRequest: ("/v1/embeddings", lambda f: {"input": "Hi", **f}, ""),
    ScoreRequest: ("/v1/score", lambda f: {"text_1": "Hi", "text_2": "Hello", **f}, ""),
    RerankRequest: ("/v1/rerank", lambda f: {"query": "Hi", "documents": ["Hello"], **f}, ""),
    RerankText: (
        "/rerank",
        lambda f: {"query": "Hi", "documents": [{"text": "Hello", **f}]},
        "documents[0].",
    ),
    ClassifyRequest: ("/classify", lambda f: {"input": "Hi", **f}, ""),
    TokenizeRequest: ("/tokenize", lambda f: {"prompt": "Hi", **f}, ""),
    DetokenizeRequest: ("/detokenize", lambda f: {"tokens": [1], **f}, ""),
}
TYPES = sorted(HONOURED, key=lambda cls: cls.__name__)
REFUSED = [(cls, name) for cls in TYPES for name in unsupported_fields(cls)]


@pytest.fixture
def any_api(cls: type[msgspec.Struct], request: pytest.FixtureRequest) -> Harness:
    """The application that serves such requests."""
    name = "api"
    if cls.__module__ == EmbeddingRequest.__module__:
        name = "labels_api" if cls is ClassifyRequest else "pooling_api"
    harness: Harness = request.getfixturevalue(name)
    return harness


@pytest.mark.parametrize("cls", TYPES)
def test_every_field_is_honoured_or_refused(cls: type[msgspec.Struct]) -> None:
    fields = {field.name for field in msgspec.structs.fields(cls)}
    honoured, refused = set(HONOURED[cls]), set(unsupported_fields(cls))
    assert not honoured & refused
    assert fields == honoured | refused


def test_every_test_named_here_exists() -> None:
    existing: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                existing.add(f"{path.stem}.{node.name}")
    named = {test for table in HONOURED.values() for test in table.values()}
    assert named <= existing, named - existing


@pytest.mark.parametrize(
    ("cls", "create"),
    [
        (ChatRequest, openai_chat.AsyncCompletions.create),
        (CompletionRequest, openai_completions.AsyncCompletions.create),
        (EmbeddingRequest, openai_embeddings.AsyncEmbeddings.create),
    ],
)
def test_every_parameter_of_the_official_client_is_known(
    cls: type[msgspec.Struct], create: Any
) -> None:
    not_sent = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    parameters = set(inspect.signature(create).parameters) - not_sent
    known = {field.name for field in msgspec.structs.fields(cls)}
    assert parameters <= known, parameters - known


@pytest.mark.parametrize(("cls", "name"), REFUSED)
async def test_refused_fields(any_api: Harness, cls: type[msgspec.Struct], name: str) -> None:
    """400 that names the field and says what to do, unless the value asks for nothing."""
    path, body, prefix = BODIES[cls]
    refusal = unsupported_fields(cls)[name]
    values: list[Any] = [{"a": 1}, [None], "x", 0, 7]
    for value in values:
        response = await any_api.http.post(path, json=body({name: value}))
        assert response.status_code == 400
        error = error_of(response)
        assert error["param"] == prefix + name
        assert "Hint: " in error["message"]
    for value in (None, False, [], {}, refusal.harmless):
        assert (await any_api.http.post(path, json=body({name: value}))).status_code == 200


def test_what_is_harmless_beside_nothing() -> None:
    """Only values that say what is done anyway."""
    refusals = {n: f for cls in TYPES for n, f in unsupported_fields(cls).items()}
    harmless = {n: f.harmless for n, f in refusals.items() if f.harmless is not None}
    assert harmless == {"parallel_tool_calls": True, "best_of": 1}


@pytest.mark.parametrize("cls", TYPES)
async def test_unknown_fields(any_api: Harness, cls: type[msgspec.Struct]) -> None:
    path, body, prefix = BODIES[cls]
    response = await any_api.http.post(path, json=body({"colour": 1}))
    assert response.status_code == 400
    assert error_of(response)["param"] == prefix + "colour"


@pytest.mark.parametrize(
    ("name", "served", "others"),
    [
        ("response_format", [{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema"}]),
        ("modalities", [["text"]], [["audio"], ["text", "audio"], []]),
        ("store", [False], [True]),
        ("service_tier", ["auto", "default"], ["flex", "priority"]),
        ("tool_choice", ["none"], ["auto", "required", {"type": "function"}]),
        ("add_special_tokens", [False], [True]),
    ],
)
async def test_values_that_ask_for_nothing(
    api: Harness, name: str, served: list[Any], others: list[Any]
) -> None:
    """Fields of which only the values are served that ask for what is done anyway."""
    for value in served:
        assert (await api.chat(**{name: value})).status_code == 200
    for value in others:
        response = await api.chat(**{name: value})
        assert response.status_code == 400
        assert error_of(response)["param"] == name


async def test_a_misspelt_field_gets_a_hint(api: Harness) -> None:
    error = error_of(await api.chat(max_token=1))
    assert "did you mean `max_tokens`" in error["message"]

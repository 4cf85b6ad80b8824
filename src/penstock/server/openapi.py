"""The OpenAPI document, made from the wire types, so that it cannot say anything else.

Fields that are refused are left out.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.protocol import native, openai, pooling
from penstock.protocol.parse import unsupported_fields

_REF = "#/components/schemas/"
_PARTS: tuple[type[msgspec.Struct], ...] = (
    openai.ChatMessage,
    openai.ContentPart,
    openai.StreamOptions,
    openai.ResponseFormat,
)
_TYPES: tuple[type[msgspec.Struct], ...] = (
    openai.ChatRequest,
    openai.ChatCompletion,
    openai.ChatChunk,
    openai.CompletionRequest,
    openai.Completion,
    openai.ModelList,
    openai.Model,
    openai.ErrorResponse,
    pooling.EmbeddingRequest,
    pooling.EmbeddingResponse,
    pooling.ScoreRequest,
    pooling.ScoreResponse,
    pooling.RerankRequest,
    pooling.RerankResponse,
    pooling.ClassifyRequest,
    pooling.ClassifyResponse,
    native.TokenizeRequest,
    native.TokenizeResponse,
    native.DetokenizeRequest,
    native.DetokenizeResponse,
    native.TokenizerInfo,
    native.Health,
    native.Version,
)
_STRUCTS = {cls.__name__: cls for cls in (*_TYPES, *_PARTS)}
# Of each path the method, a summary, and the types of request, answer and streamed event.
_ROUTES: dict[str, tuple[str, str, str | None, str | None, str | None]] = {
    "/v1/chat/completions": ("post", "Answer a chat", "ChatRequest", "ChatCompletion", "ChatChunk"),
    "/v1/completions": (
        *("post", "Continue a prompt", "CompletionRequest", "Completion", "Completion"),
    ),
    "/v1/embeddings": ("post", "Embed texts", "EmbeddingRequest", "EmbeddingResponse", None),
    "/v1/score": ("post", "Score pairs of texts", "ScoreRequest", "ScoreResponse", None),
    "/v1/rerank": ("post", "Rank documents", "RerankRequest", "RerankResponse", None),
    "/rerank": ("post", "The same", "RerankRequest", "RerankResponse", None),
    "/classify": ("post", "Score labels of texts", "ClassifyRequest", "ClassifyResponse", None),
    "/v1/models": ("get", "The models served", None, "ModelList", None),
    "/v1/models/{model}": ("get", "One model", None, "Model", None),
    "/tokenize": ("post", "Text to tokens", "TokenizeRequest", "TokenizeResponse", None),
    "/detokenize": ("post", "Tokens to text", "DetokenizeRequest", "DetokenizeResponse", None),
    "/tokenizer_info": ("get", "The tokenizer", None, "TokenizerInfo", None),
    "/health": ("get", "Whether the process can serve at all", None, "Health", None),
    "/ready": ("get", "Whether to send requests now", None, "Health", None),
    "/version": ("get", "The version", None, "Version", None),
    "/metrics": ("get", "Prometheus metrics", None, None, None),
    "/openapi.json": ("get", "This document", None, None, None),
}


def document(version: str) -> dict[str, Any]:
    """The whole document."""
    _, components = msgspec.json.schema_components(_TYPES, ref_template=_REF + "{name}")
    for name, schema in components.items():
        for field in unsupported_fields(_STRUCTS[name]) if name in _STRUCTS else ():
            schema["properties"].pop(field, None)
    return {
        "openapi": "3.1.0",
        "info": {"title": "penstock", "version": version},
        "paths": {path: _path(path, *route) for path, route in _ROUTES.items()},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _path(
    path: str,
    method: str,
    summary: str,
    request: str | None,
    response: str | None,
    streamed: str | None,
) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if response is not None:
        content = _json(response)
    if streamed is not None:
        content["text/event-stream"] = {"schema": {"$ref": _REF + streamed}}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {
            "200": {"description": "OK", "content": content},
            "default": {"description": "An error", "content": _json("ErrorResponse")},
        },
    }
    if request is not None:
        operation["requestBody"] = {"required": True, "content": _json(request)}
    if "{model}" in path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return {method: operation}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF + name}}}

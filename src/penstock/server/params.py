"""From the fields of a request to `SamplingParams`: what is asked is done, or refused with 400.

Ranges are checked by `SamplingParams`; here is checked what depends on the model or the settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

from penstock.errors import ContextTooLong, InvalidField
from penstock.protocol.openai import ChatRequest, CompletionRequest
from penstock.server.service import Service
from penstock.types import SamplingParams

_MAX_STOP_CHARS = 1024
_MAX_SALT_CHARS = 256
_PRIORITY_LIMIT = 2**31

# The same name and meaning in the request and in SamplingParams.
_PLAIN = (
    *("n", "min_tokens", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed", "ignore_eos"),
    *("prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens"),
)
_ID_LISTS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")


def chat_params(request: ChatRequest, service: Service) -> SamplingParams:
    """How to sample the answer of a chat. Without a limit it may fill the context.

    Raises:
        InvalidField: a field cannot be honoured.
    """
    _check_choices(request)
    max_tokens = _chat_max_tokens(request)
    logprobs = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
        _check_logprobs("top_logprobs", logprobs, service)
    elif request.top_logprobs is not None:
        raise InvalidField(
            "`top_logprobs` is set without `logprobs`.",
            field="top_logprobs",
            hint="set `logprobs` to true",
        )
    return _params(request, service, max_tokens=max_tokens, logprobs=logprobs)


def completion_params(request: CompletionRequest, service: Service) -> SamplingParams:
    """How to sample the continuation of a prompt. `max_tokens` of 0 is sampled as 1.

    Raises:
        InvalidField: a field cannot be honoured.
    """
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    if request.logprobs is not None:
        _check_logprobs("logprobs", request.logprobs, service)
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    values: dict[str, Any] = {"logprobs": request.logprobs, "prompt_logprobs": prompt_logprobs}
    return _params(request, service, max_tokens=max_tokens or 1, **values)


def _chat_max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidField(
            f"`max_tokens` is `{old}` and `max_completion_tokens` is `{new}`.",
            field="max_completion_tokens",
            hint="give one of them",
        )
    for name, value in (("max_completion_tokens", new), ("max_tokens", old)):
        if value is not None and value < 1:
            raise InvalidField(f"`{name}` is `{value}`; it must be at least `1`.", field=name)
    return old if new is None else new


def _check_choices(request: ChatRequest) -> None:
    """Fields of which only the values that ask for nothing more than text are served."""
    served: tuple[tuple[str, object, object], ...] = (
        ("response_format", request.response_format and request.response_format.type, "text"),
        ("modalities", request.modalities, ["text"]),
        ("store", request.store, False),
        ("tool_choice", request.tool_choice, "none"),
    )
    for name, value, only in served:
        if value is not None and value != only:
            raise InvalidField(
                f"`{name}` is not supported with this value.",
                field=name,
                hint=f"leave it out; the one value that is served is `{only}`",
            )
    if request.service_tier not in (None, "auto", "default"):
        raise InvalidField(
            "`service_tier` must be `auto` or `default`; there is one tier.", field="service_tier"
        )


def _params(
    request: ChatRequest | CompletionRequest, service: Service, **values: Any
) -> SamplingParams:
    info = service.client.info
    _check_stream(request)
    _check_priority_and_salt(request, service)
    if request.prompt_logprobs is not None:
        _check_logprobs("prompt_logprobs", request.prompt_logprobs, service)
    for name in _PLAIN:
        if name not in values and (value := getattr(request, name)) is not None:
            values[name] = value
    for name in _ID_LISTS:
        if (ids := getattr(request, name)) is not None:
            _check_ids(name, ids, info.vocab_size)
            values[name] = tuple(dict.fromkeys(ids))
    _check_ids("logit_bias", request.logit_bias or (), info.vocab_size)
    if request.top_k is not None:  # -1 is vLLM's "all"
        values["top_k"] = min(max(0, request.top_k) if request.top_k >= -1 else -1, info.vocab_size)
    values["stop"] = _stop(request, service)
    if (request.min_tokens or 0) > info.max_model_len:
        raise InvalidField(
            f"`min_tokens` is `{request.min_tokens}`, more than the context of "
            f"`{info.max_model_len}` tokens.",
            field="min_tokens",
        )
    return SamplingParams(**values)


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    if len(ids) > vocab_size:
        raise InvalidField(
            f"`{name}` has `{len(ids)}` entries; the vocabulary has `{vocab_size}` tokens.",
            field=name,
            hint="name each token once",
        )
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidField(
                f"`{name}` names the token `{token_id}`; the vocabulary has `{vocab_size}`.",
                field=name,
            )


def _stop(request: ChatRequest | CompletionRequest, service: Service) -> tuple[str, ...]:
    stop = request.stop
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    limit = service.settings.max_stop_strings
    if len(strings) > limit:
        raise InvalidField(
            f"`stop` has `{len(strings)}` strings; at most `{limit}` are served.", field="stop"
        )
    if any(len(text) > _MAX_STOP_CHARS for text in strings):
        raise InvalidField(
            f"`stop` has a string of more than `{_MAX_STOP_CHARS}` characters.", field="stop"
        )
    return strings


def _check_logprobs(name: str, value: int, service: Service) -> None:
    limit = service.settings.max_logprobs
    if not 0 <= value <= limit:
        raise InvalidField(
            f"`{name}` is `{value}`; it must be in [0, {limit}].",
            field=name,
            hint="the upper end is `--max-logprobs`",
        )


def _check_stream(request: ChatRequest | CompletionRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidField(
            "`stream_options` is set without `stream`.",
            field="stream_options",
            hint="set `stream` to true, or leave it out",
        )
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidField(
            "`prompt_logprobs` cannot be streamed.",
            field="prompt_logprobs",
            hint="set `stream` to false",
        )


def _check_priority_and_salt(request: ChatRequest | CompletionRequest, service: Service) -> None:
    if request.priority:
        if not service.honours_priority:
            raise InvalidField(
                "`priority` is not honoured by this server's scheduling policy.",
                field="priority",
                hint="start it with `--scheduling-policy priority`",
            )
        if not -_PRIORITY_LIMIT <= request.priority < _PRIORITY_LIMIT:
            raise InvalidField("`priority` must be a 32-bit integer.", field="priority")
    if len(request.cache_salt or "") > _MAX_SALT_CHARS:
        raise InvalidField(
            f"`cache_salt` has more than `{_MAX_SALT_CHARS}` characters.", field="cache_salt"
        )


def check_context(
    num_prompt_tokens: int,
    params: SamplingParams,
    service: Service,
    *,
    field: str,
    limit_field: str = "max_tokens",
) -> None:
    """Whether a prompt and the answer that is asked for fit into the context.

    Args:
        field: the field that brought the prompt. limit_field: the one that limits the answer.

    Raises:
        InvalidField: the prompt is empty.
        ContextTooLong: they do not fit.
    """
    context = service.client.info.max_model_len
    if not num_prompt_tokens:
        raise InvalidField("The prompt is empty.", field=field, hint="give at least one token")
    if num_prompt_tokens >= context:
        raise ContextTooLong(
            f"The prompt has `{num_prompt_tokens}` tokens; the context is `{context}` and one "
            "token of answer must fit.",
            field=field,
            hint="shorten the prompt",
        )
    if params.max_tokens is not None and num_prompt_tokens + params.max_tokens > context:
        raise ContextTooLong(
            f"The prompt has `{num_prompt_tokens}` tokens and `{limit_field}` is "
            f"`{params.max_tokens}`; together they exceed the context of `{context}`.",
            field=limit_field,
            hint=f"ask for at most `{context - num_prompt_tokens}` tokens",
        )


def digest(text: str | None) -> str | None:
    """What the log keeps of a name that may be a person's."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]

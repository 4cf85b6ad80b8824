"""The wire types of the OpenAI protocol: chat, completions, models, errors.

Names are OpenAI's, and vLLM's where OpenAI has none. Knows no engine and no HTTP. Of a request
every field is either honoured by the server or marked `not_supported` with the reason; a field
that is not listed here is an error (`penstock.protocol.parse`). None means: not given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from penstock.protocol.parse import not_supported

_TOOLS_REASON = "tool calls are not served yet; describe the tools in a message"
_NO_TOOLS = not_supported(_TOOLS_REASON)
_NO_MEDIA = not_supported("this server reads and writes text only")
_NO_CACHE_KEY = not_supported(
    "equal prefixes are found without a key; use `cache_salt` to keep them apart"
)


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What every request that names a model has."""

    model: str | None = None  # None: the one that is served


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None  # a last chunk with the usage and without choices
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk
    include_obfuscation: Annotated[Any, not_supported("chunks are not padded")] = None


class _SamplingRequest(_Request, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What chat and completions share."""

    n: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    user: str | None = None  # logged as a digest
    # vLLM's fields
    top_k: int | None = None  # 0 or -1: all
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None  # lower goes first
    cache_salt: str | None = None  # prefixes are shared only with requests of the same salt
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A piece of a message."""

    type: str
    text: str | None = None
    image_url: Annotated[Any, _NO_MEDIA] = None
    input_audio: Annotated[Any, _NO_MEDIA] = None
    file: Annotated[Any, _NO_MEDIA] = None
    refusal: Annotated[Any, _NO_MEDIA] = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None  # for the template
    type: Literal["text"] | None = None  # lm-evaluation-harness says it of every message
    refusal: Annotated[Any, not_supported("this server writes no refusals")] = None
    audio: Annotated[Any, _NO_MEDIA] = None
    tool_calls: Annotated[Any, _NO_TOOLS] = None
    tool_call_id: Annotated[Any, _NO_TOOLS] = None
    function_call: Annotated[Any, _NO_TOOLS] = None
    annotations: Annotated[Any, not_supported("this server writes no annotations")] = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Only `text` is served."""

    type: str
    json_schema: Annotated[Any, not_supported("answers are free text")] = None


class ChatRequest(_SamplingRequest, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None  # only {"type": "text"}
    modalities: list[str] | None = None  # only ["text"]
    store: bool | None = None  # only false: nothing is stored
    service_tier: str | None = None  # only "auto" and "default"
    tool_choice: str | dict[str, Any] | None = None  # only "none"
    safety_identifier: str | None = None  # logged as a digest
    # vLLM's fields
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # known and refused
    tools: Annotated[Any, _NO_TOOLS] = None
    parallel_tool_calls: Annotated[Any, not_supported(_TOOLS_REASON, harmless=True)] = None
    functions: Annotated[Any, _NO_TOOLS] = None
    function_call: Annotated[Any, _NO_TOOLS] = None
    audio: Annotated[Any, _NO_MEDIA] = None
    metadata: Annotated[Any, not_supported("nothing is stored that could carry it")] = None
    moderation: Annotated[Any, not_supported("no moderation model runs here")] = None
    prediction: Annotated[Any, not_supported("predicted outputs are not served")] = None
    prompt_cache_key: Annotated[Any, _NO_CACHE_KEY] = None
    prompt_cache_options: Annotated[Any, _NO_CACHE_KEY] = None
    prompt_cache_retention: Annotated[Any, _NO_CACHE_KEY] = None
    reasoning_effort: Annotated[
        Any, not_supported("if the model's template reads it, use `chat_template_kwargs`")
    ] = None
    verbosity: Annotated[
        Any, not_supported("if the model's template reads it, use `chat_template_kwargs`")
    ] = None
    web_search_options: Annotated[Any, not_supported("this server reaches no network")] = None
    echo: Annotated[Any, not_supported("it belongs to /v1/completions")] = None
    continue_final_message: Annotated[
        Any, not_supported("render the prompt yourself and use /v1/completions")
    ] = None


class CompletionRequest(_SamplingRequest, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The body of POST /v1/completions."""

    # text, texts, token ids, or lists of token ids; mixing them is an error
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Annotated[Any, not_supported("the model continues text, it fills no gaps")] = None
    best_of: Annotated[Any, not_supported("ask for `n` answers and choose one", harmless=1)] = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many prompt tokens came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """The tokens of a request; of a prompt with several answers the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token that was chosen."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of every token of the answer, in order."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's entry of `prompt_logprobs`, under the token id as key."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class AnswerMessage(msgspec.Struct, frozen=True):
    """The answer of a chat."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `n` answers. `stop_reason` is the stop string or stop token id, else null."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a chat request."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: str = "default"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat. `usage` is there only if `include_usage` was asked for."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    service_tier: str = "default"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Of every token of the text (with `echo`, of the prompt too). All lists have one length.

    A token that is not whole UTF-8 is written `bytes:\\xe2\\x82`. Offsets count characters of
    the text. The first token of a prompt has no logprob: null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer; in a stream a part of it, and only the last part has a `finish_reason`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a completion request, or one event of it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "penstock"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    """The answer to GET /v1/models."""

    data: list[Model]
    object: str = "list"


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. `code` is for programs, `param` is the field, `request_id` finds the log."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    request_id: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer that is not 2xx, and the last event of a stream that broke."""

    error: Error
    usage: Usage | UnsetType = UNSET  # in a stream: what was used until then

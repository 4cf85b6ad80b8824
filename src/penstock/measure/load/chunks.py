"""What one piece of an answer says, in the dialects that are measured: pure functions of its JSON.

Knows no time and no row. Fields that are not needed are skipped, whatever they hold; one that is
needed and has another type is a `BadChunk`. A chunk is not a token: `Said` tells what came, and how
many tokens the server says that makes, if it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec


class BadChunk(Exception):
    """The answer is not what the dialect says. The message is one sentence."""


class ServerError(Exception):
    """The server says within its answer that it has failed. The message is the server's."""


class Usage(NamedTuple):
    """Tokens, as the server counts them."""

    num_in: int | None
    num_out: int | None
    num_cached: int | None = None  # of num_in, from the prefix cache
    num_reasoning: int | None = None  # of num_out


class Said(NamedTuple):
    """What a chunk, or a whole answer, says."""

    text: str = ""  # of the first choice
    reasoning: str = ""
    is_visible: bool = False  # text of any choice, or a tool call
    is_reasoning: bool = False  # of any choice
    has_choices: bool = False
    num_new: int | None = None  # tokens of this chunk, where the dialect has one for each token
    usage: Usage | None = None  # so far
    finish_reason: str | None = None
    logprobs: Any = None

    @property
    def has_content(self) -> bool:
        return self.is_visible or self.is_reasoning


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    reasoning_tokens: int | None = None  # SGLang, where 0 also means that nobody counted

    def as_usage(self) -> Usage:
        prompt, completion = self.prompt_tokens_details, self.completion_tokens_details
        num_reasoning = None if completion is None else completion.reasoning_tokens
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            None if prompt is None else prompt.cached_tokens,
            (self.reasoning_tokens or None) if num_reasoning is None else num_reasoning,
        )


class _Part(msgspec.Struct):
    """A part of a content that is a list."""

    text: str | None = None
    thinking: str | list[_Part] | None = None  # Mistral


class _Message(msgspec.Struct):
    """A message, or a part of one."""

    content: str | list[_Part] | None = None
    reasoning_content: str | None = None  # vLLM before 0.12, SGLang, DeepSeek, llama-server
    reasoning: str | None = None  # vLLM, OpenRouter, Groq
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: Any = None  # before `tool_calls`


class _Choice(msgspec.Struct):
    index: int | None = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Any = None


class _OpenAI(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None  # "error": an older way to say so
    message: Any = None


class _Token(msgspec.Struct):
    text: str = ""
    special: bool = False


class _TgiDetails(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int | None = None
    input_length: int | None = None
    prefill: list[msgspec.Raw] | None = None


class _Tgi(msgspec.Struct):
    token: _Token | None = None
    generated_text: str | None = None
    details: _TgiDetails | None = None
    error: Any = None


_decode_openai = msgspec.json.Decoder(_OpenAI).decode
_decode_tgi = msgspec.json.Decoder(_Tgi).decode
Parse = Callable[[str | bytes], Said]


def openai(data: str | bytes) -> Said:
    """A chunk of a stream, or a whole answer, of chat completions or completions.

    Raises:
        BadChunk, ServerError: see there.
    """
    document: _OpenAI = _decoded(_decode_openai, data)
    if document.error or document.object == "error":
        raise ServerError(error_text(document.error or document.message))
    if document.choices is None and document.usage is None:
        raise BadChunk("A chunk of the answer has neither `choices` nor `usage`.")
    text = reasoning = ""
    is_visible = is_reasoning = False
    finish_reason, logprobs = None, None
    for choice in document.choices or ():
        message = choice.delta or choice.message or _EMPTY
        said, thought = _of_parts(message.content)
        said = choice.text or said or message.refusal or ""
        thought = message.reasoning_content or message.reasoning or thought
        called = message.tool_calls or message.function_call
        is_visible = is_visible or bool(said or called)
        is_reasoning = is_reasoning or bool(thought)
        if not choice.index:
            text, reasoning = text + said, reasoning + thought
            finish_reason, logprobs = choice.finish_reason or None, choice.logprobs
    if finish_reason == "error":
        raise ServerError("The answer ended with the `finish_reason` `error`.")
    return Said(
        text,
        reasoning,
        is_visible,
        is_reasoning,
        bool(document.choices),
        None,
        None if document.usage is None else document.usage.as_usage(),
        finish_reason,
        logprobs,
    )


def tgi(data: str | bytes) -> Said:
    """An event of /generate_stream, which is one token, or the answer of /generate.

    Raises:
        BadChunk, ServerError: see there.
    """
    document: _Tgi = _decoded(_decode_tgi, data)
    if document.error is not None:
        raise ServerError(error_text(document.error))
    token, details = document.token, document.details
    if token is None and document.generated_text is None:
        raise BadChunk("An event of the answer has neither `token` nor `generated_text`.")
    text = document.generated_text or ""
    if token is not None:  # the last event has the whole text, too
        text = "" if token.special else token.text
    usage = None
    if details is not None:
        num_in = details.input_length
        if num_in is None and details.prefill:
            num_in = len(details.prefill)
        usage = Usage(num_in, details.generated_tokens)
    return Said(
        text=text,
        is_visible=bool(text),
        has_choices=True,
        num_new=None if token is None else 1,
        usage=usage,
        finish_reason=None if details is None else details.finish_reason,
    )


def error_of(data: str | bytes) -> str:
    """The message of an error: of its JSON, or its text in one line."""
    try:
        return error_text(msgspec.json.decode(data))
    except (msgspec.DecodeError, UnicodeError):
        text = data if isinstance(data, str) else data[:1000].decode("utf-8", "replace")
        return " ".join(text.split()) or "The server gives no reason."


def error_text(error: Any) -> str:
    """The message in an error of any usual shape."""
    if isinstance(error, dict):
        for name in ("message", "detail", "error", "msg"):
            if error.get(name):
                return error_text(error[name])
        return msgspec.json.encode(error).decode()
    if isinstance(error, list) and error:
        return error_text(error[0])
    return "The server gives no reason." if error is None else str(error)


def join_logprobs(parts: list[Any]) -> Any:
    """The log probabilities of a stream's chunks as one: their lists end to end."""
    if len(parts) < 2 or not all(isinstance(part, dict) for part in parts):
        return parts[0] if len(parts) == 1 else (parts or None)
    joined: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, list) and isinstance(joined.get(name), list):
                joined[name] = joined[name] + value
            elif joined.get(name) is None:
                joined[name] = value
    return joined


_EMPTY = _Message()


def _of_parts(content: str | list[_Part] | None) -> tuple[str, str]:
    """Text and reasoning of a content."""
    if content is None or isinstance(content, str):
        return content or "", ""
    thoughts = ("".join(_of_parts(part.thinking)) for part in content)
    return "".join(part.text or "" for part in content), "".join(thoughts)


def _decoded(decode: Callable[[str | bytes], Any], data: str | bytes) -> Any:
    try:
        return decode(data)
    except msgspec.ValidationError as error:
        raise BadChunk(f"A chunk of the answer has another shape: {error}.") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadChunk(f"A chunk of the answer is not JSON: {error}.") from None

"""From a question to the path and the body of a request: pure functions, one for each dialect.

Knows what the servers' fields are called, not whether a server takes them: that is `takes`, a set
of names of OPTIONAL, which `endpoint` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, Literal, NamedTuple

from penstock.measure.load import chunks
from penstock.measure.load.target import Ask

Route = Literal["openai-chat", "openai-completions", "tgi"]

# What not every server takes, and what it means for the user if one does not.
OPTIONAL = {
    "temperature": "it samples at the temperature that it likes",
    "seed": "answers cannot be repeated",
    "stream_options.include_usage": "tokens are counted by a tokenizer, or are chunks",
    "stream_options.continuous_usage_stats": "tokens within a chunk are not known",
    "ignore_eos": "answers may be shorter than a fixed length",
    "min_tokens": "answers may be shorter than a fixed length where it ignores `ignore_eos`",
}
# Where nobody has tried: what the field agrees on, and what is sent only on demand.
USUAL = frozenset(OPTIONAL) - {"stream_options.continuous_usage_stats"}
NEW_LIMIT = "max_completion_tokens"  # instead of `max_tokens`: newer models of OpenAI


class CannotSay(Exception):
    """The dialect has no words for this question. The message is one sentence."""


class Dialect(NamedTuple):
    """How a server is asked, and how it answers."""

    body: Callable[[Ask, str, Set[str]], dict[str, Any]]
    path: str  # below the base of the API (`/v1`), or below the server's root
    stream_path: str
    is_below_root: bool
    parse: chunks.Parse


def chat(ask: Ask, model: str, takes: Set[str]) -> dict[str, Any]:
    """The body of POST /v1/chat/completions; a prompt becomes the user's message.

    Raises:
        CannotSay: the prompt is token ids.
    """
    messages = ask.messages
    if messages is None:
        if not isinstance(ask.prompt, str):
            raise CannotSay("Token ids cannot be sent to chat completions.")
        messages = [{"role": "user", "content": ask.prompt}]
    return {"model": model, "messages": messages} | _openai(ask, takes)


def completions(ask: Ask, model: str, takes: Set[str]) -> dict[str, Any]:
    """The body of POST /v1/completions.

    Raises:
        CannotSay: messages need a chat template.
    """
    if ask.prompt is None:
        raise CannotSay("Messages cannot be sent to completions.")
    return {"model": model, "prompt": ask.prompt} | _openai(ask, takes)


def _openai(ask: Ask, takes: Set[str]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if ask.max_tokens is not None:
        body[NEW_LIMIT if NEW_LIMIT in takes else "max_tokens"] = ask.max_tokens
    if "temperature" in takes:
        body["temperature"] = ask.temperature
    if ask.seed is not None and "seed" in takes:
        body["seed"] = ask.seed
    if ask.stop:
        body["stop"] = ask.stop
    if ask.fixed_length:
        body |= {"ignore_eos": True} if "ignore_eos" in takes else {}
        body |= {"min_tokens": ask.max_tokens} if "min_tokens" in takes else {}
    if ask.stream:
        body["stream"] = True
        names = ("include_usage", "continuous_usage_stats")
        options = {name: True for name in names if f"stream_options.{name}" in takes}
        body |= {"stream_options": options} if options else {}
    return body | ask.extra


def tgi(ask: Ask, model: str, takes: Set[str]) -> dict[str, Any]:
    """The body of POST /generate and /generate_stream; `extra["parameters"]` are merged.

    Raises:
        CannotSay: the prompt is not text.
    """
    if not isinstance(ask.prompt, str):
        raise CannotSay("Only text can be sent to /generate: no messages, no token ids.")
    parameters: dict[str, Any] = {"details": True}
    if ask.max_tokens is not None:
        parameters["max_new_tokens"] = ask.max_tokens
    if ask.temperature > 0:  # 0 is refused; without sampling it is what is done
        parameters |= {"temperature": ask.temperature, "do_sample": True}
    if ask.seed is not None:
        parameters["seed"] = ask.seed
    if ask.stop:
        parameters["stop"] = ask.stop
    parameters |= ask.extra.get("parameters", {})
    return {"inputs": ask.prompt} | ask.extra | {"parameters": parameters}


_CHAT, _COMPLETIONS = "/chat/completions", "/completions"
DIALECTS: dict[Route, Dialect] = {
    "openai-chat": Dialect(chat, _CHAT, _CHAT, False, chunks.openai),
    "openai-completions": Dialect(completions, _COMPLETIONS, _COMPLETIONS, False, chunks.openai),
    "tgi": Dialect(tgi, "/generate", "/generate_stream", True, chunks.tgi),
}

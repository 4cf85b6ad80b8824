"""From the prompts of a request to token ids. Runs in a thread: templates and texts may be long.

What a user writes in a message is text: a special token spelt out in it stays text. The prompt of
a completion is the whole input of the model, so there special tokens are parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from penstock.errors import InvalidField
from penstock.protocol.native import TokenizeRequest
from penstock.protocol.openai import ChatMessage, ChatRequest, CompletionRequest
from penstock.server.generation import Prompt
from penstock.server.service import Service

_MAX_KWARGS = 64
_MAX_KWARGS_CHARS = 16 * 2**10
_RESERVED = frozenset({"self", "tokenizer", "messages", "tools", "add_generation_prompt"})


def completion_prompts(request: CompletionRequest, service: Service) -> list[Prompt]:
    """The prompts of a completion request: text, texts, token ids, or lists of token ids.

    Raises:
        InvalidField: they are empty, mixed, or not of the vocabulary.
        ContextTooLong: a text cannot fit, however it is tokenized.
    """
    given = request.prompt
    affixes = request.add_special_tokens is not False
    items: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not items:
        raise InvalidField("`prompt` is an empty list.", field="prompt")
    kinds = {type(item) for item in items}
    if len(kinds) > 1:
        raise InvalidField("`prompt` mixes texts, token ids and lists.", field="prompt")
    if kinds == {str}:
        echo = request.echo is True
        texts = [str(text) for text in items]
        for text in texts:
            service.text_limit.check(len(text.encode()), "prompt")
        return [_text_prompt(text, affixes, echo, service) for text in texts]
    lists = [items] if kinds == {int} else items
    return [_token_prompt(ids, request, service) for ids in lists]  # type: ignore[arg-type]


def num_prompts(request: CompletionRequest) -> int:
    """How many prompts a request brings."""
    given = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return 1
    return max(1, len(given))


def _text_prompt(text: str, affixes: bool, echo: bool, service: Service) -> Prompt:
    token_ids = service.tokenizer.encode(text, add_special_tokens=affixes)
    if not echo:
        return Prompt(token_ids=token_ids)
    around = _affixes(token_ids, service) if affixes else (0, 0)
    return Prompt(token_ids=token_ids, text=text, is_text=True, offset=len(text), affixes=around)


def _affixes(token_ids: list[int], service: Service) -> tuple[int, int]:
    """How many tokens the tokenizer has put before a text, and after it."""
    added = service.tokenizer.encode("")
    pairs = zip(added, token_ids, strict=False)
    num_before = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return num_before, len(added) - num_before


def _token_prompt(token_ids: list[int], request: CompletionRequest, service: Service) -> Prompt:
    vocab_size = service.client.info.vocab_size
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidField(
                f"`prompt` holds the token `{token_id}`; the vocabulary has `{vocab_size}`.",
                field="prompt",
            )
    if not request.echo:
        return Prompt(token_ids=token_ids)
    text = service.tokenizer.decode(
        token_ids, skip_special_tokens=request.skip_special_tokens is not False
    )
    return Prompt(token_ids=token_ids, text=text, offset=len(text))


def chat_token_ids(request: ChatRequest | TokenizeRequest, service: Service) -> list[int]:
    """The token ids of a conversation, rendered by the model's chat template.

    Raises:
        InvalidField: the conversation cannot be rendered.
        ContextTooLong: its texts cannot fit.
    """
    if service.template is None:
        raise InvalidField(
            "This model has no chat template.", field="messages", hint="use /v1/completions"
        )
    messages = _messages(request.messages or [], service)
    if isinstance(request, ChatRequest):  # who only wants to count may count more
        size = sum(len(message["content"].encode()) for message in messages)
        service.text_limit.check(size, "messages")
    if request.add_special_tokens:
        raise InvalidField(
            "`add_special_tokens` cannot be true for messages: the chat template writes them.",
            field="add_special_tokens",
        )
    return service.template.encode(
        service.tokenizer,
        messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        **_kwargs(request),
    )


def _messages(messages: Sequence[ChatMessage], service: Service) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidField("`messages` is empty.", field="messages")
    limit = service.settings.max_messages
    if len(messages) > limit:
        raise InvalidField(
            f"`messages` has `{len(messages)}` entries; at most `{limit}` are served.",
            field="messages",
            hint="the limit is `--max-messages`",
        )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: ChatMessage, path: str) -> dict[str, Any]:
    if message.role in ("tool", "function"):
        raise InvalidField(
            f"`{path}.role` is `{message.role}`; tool calls are not served yet.",
            field=f"{path}.role",
            hint="put the result into a user message",
        )
    # OpenAI's newer name for what every template calls "system".
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": _content(message, path)}
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _content(message: ChatMessage, path: str) -> str:
    if message.content is None:
        raise InvalidField(f"`{path}.content` is missing.", field=f"{path}.content")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        field = f"{path}.content[{index}]"
        if part.type != "text":
            raise InvalidField(
                f"`{field}.type` is `{part.type[:64]}`; this server reads text only.",
                field=f"{field}.type",
            )
        if part.text is None:
            raise InvalidField(f"`{field}.text` is missing.", field=f"{field}.text")
        texts.append(part.text)
    return "\n".join(texts)


def _kwargs(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    kwargs = request.chat_template_kwargs or {}
    if taken := _RESERVED & kwargs.keys():
        raise InvalidField(
            f"`chat_template_kwargs` has `{min(taken)}`, which is not the user's to set.",
            field="chat_template_kwargs",
        )
    if len(kwargs) > _MAX_KWARGS or len(repr(kwargs)) > _MAX_KWARGS_CHARS:
        raise InvalidField(
            f"`chat_template_kwargs` is larger than `{_MAX_KWARGS}` entries or "
            f"`{_MAX_KWARGS_CHARS}` characters.",
            field="chat_template_kwargs",
        )
    return kwargs

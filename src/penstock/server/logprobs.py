"""Log-probabilities of tokens in the shapes of the OpenAI protocol."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.protocol.openai import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from penstock.text.stream import TokenText
from penstock.text.tokenizer import Tokenizer
from penstock.types import TokenLogprobs


def chat_logprobs(tokens: Sequence[TokenText]) -> ChatLogprobs:
    """The chat shape: a list of objects."""
    return ChatLogprobs(
        [
            TokenLogprob(
                token.text,
                _finite(token.logprob or 0.0),
                list(token.data),
                [TopLogprob(top.text, _finite(top.logprob), list(top.data)) for top in token.top],
            )
            for token in tokens
        ]
    )


def completion_logprobs(tokens: Sequence[TokenText]) -> CompletionLogprobs:
    """The shape of completions: four lists.

    `top_logprobs` also holds the token itself, with the very same number. Of tokens with the same
    text it keeps the likeliest: `max` of the values is the likeliest token's, always.
    """
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            tops.append(None)
            continue
        top = {_name(token.text, token.data): _finite(token.logprob)}
        for other in token.top:
            name = _name(other.text, other.data)
            top[name] = max(top.get(name, -_LARGEST), _finite(other.logprob))
        tops.append(top)
    return CompletionLogprobs(
        [_name(token.text, token.data) for token in tokens],
        [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        tops,
        [token.offset for token in tokens],
    )


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], top_k: int, tokenizer: Tokenizer
) -> PromptLogprobs:
    """vLLM's shape: by token id; the prompt's own token is always there."""
    shown: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        ranked = {
            token_id: PromptLogprob(_finite(logprob), rank, tokenizer.token_text(token_id))
            for rank, (token_id, logprob) in enumerate(entry.top[:top_k], 1)
        }
        ranked.setdefault(
            entry.token_id,
            PromptLogprob(_finite(entry.logprob), entry.rank, tokenizer.token_text(entry.token_id)),
        )
        shown.append({str(token_id): value for token_id, value in ranked.items()})
    return shown


_LARGEST = 9999.0  # JSON has no infinity


def _finite(logprob: float) -> float:
    return max(logprob, -_LARGEST)


def _name(text: str, data: bytes) -> str:
    """The text of a token, or OpenAI's spelling of bytes that are not whole characters."""
    if text.encode() == data:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

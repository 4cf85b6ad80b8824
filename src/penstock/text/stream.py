"""Turns one request's token events into text: for the HTTP server and for the offline API alike.

Owns what a user sees of a token: its text, bytes and offset, and which stop tokens are hidden.
Invariant: texts joined equal the text of the whole answer, however the events were merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from penstock.text.detokenizer import Detokenizer
from penstock.text.tokenizer import Tokenizer
from penstock.types import FinishReason, SamplingParams, TokenEvent, TokenLogprobs, Usage


class TopToken(NamedTuple):
    """One of the likeliest tokens at a position."""

    token_id: int
    text: str
    data: bytes
    logprob: float


class TokenText(NamedTuple):
    """A token as an API shows it: its own text (U+FFFD for part of a character) and bytes."""

    token_id: int
    text: str
    data: bytes
    offset: int  # characters of the text complete before it
    logprob: float | None  # None for the first token of a prompt
    rank: int | None
    top: tuple[TopToken, ...]


class TextDelta(NamedTuple):
    """What one event adds to an answer."""

    text: str
    finish: FinishReason | None  # of the answer; also set where a stop string ends it
    stop_reason: str | int | None  # the stop string or stop token id that ended it; None for eos
    usage: Usage
    logprobs: list[TokenText] | None  # of every token that counts, where the request asked


class TextStream:
    """The text of one answer.

    As in vLLM, the token that ended the answer (end of sequence or a stop token) has no text unless
    `include_stop_str_in_output`. A stop string is found here, not in the engine: if `delta.finish`
    is set while the event's was not, the caller must abort the request in the engine, and push no
    further event.

    Args:
        prompt_ids: the prompt, if the answer continues its text (completions); empty for chat.
        offset: where the answer begins in the text that token offsets count (echoed prompts).
    """

    __slots__ = ("_detokenizer", "_offset", "_params", "_piecewise", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] = (),
        offset: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._offset = offset
        self._piecewise = bool(params.stop) or params.logprobs is not None
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            prompt_ids=prompt_ids,
        )

    def push(self, event: TokenEvent) -> TextDelta:
        """The text that the event makes certain; with `event.finish`, all the rest."""
        detokenizer, params, usage = self._detokenizer, self._params, event.usage
        num_shown = len(event.token_ids)
        if event.stop_token_id is not None and not params.include_stop_str_in_output:
            num_shown -= 1
        entries: list[TokenText] | None = None
        if self._piecewise:
            text, num_used, entries = self._push_each(event, num_shown)
            num_unused = len(event.token_ids) - num_used
            usage = usage._replace(num_generated_tokens=usage.num_generated_tokens - num_unused)
        else:
            text = detokenizer.push(event.token_ids[:num_shown])
        if event.finish is not None:
            text += detokenizer.flush()
        if detokenizer.stopped is not None:
            return TextDelta(text, FinishReason.STOP, detokenizer.stopped, usage, entries)
        by_id = event.stop_token_id in params.stop_token_ids
        return TextDelta(text, event.finish, event.stop_token_id if by_id else None, usage, entries)

    def _push_each(
        self, event: TokenEvent, num_shown: int
    ) -> tuple[str, int, list[TokenText] | None]:
        """Token by token: the text, how many tokens it took, and their entries if asked for."""
        detokenizer, texts = self._detokenizer, []
        logprobs = event.logprobs if self._params.logprobs is not None else None
        entries: list[TokenText] | None = None if logprobs is None else []
        num_used = len(event.token_ids)
        for index, token_id in enumerate(event.token_ids):
            if entries is not None and logprobs is not None:
                offset = self._offset + detokenizer.num_chars
                entries.append(_token_text(self._tokenizer, token_id, logprobs[index], offset))
            if index < num_shown:
                texts.append(detokenizer.push((token_id,)))
                if detokenizer.stopped is not None:
                    num_used = index + 1
                    break
        return "".join(texts), num_used, entries


def prompt_token_texts(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    logprobs: Iterable[TokenLogprobs | None],
    *,
    skip_special_tokens: bool = True,
) -> list[TokenText]:
    """The tokens of an echoed prompt; offsets count in `Tokenizer.decode(prompt_ids)`.

    Args:
        logprobs: `TokenEvent.prompt_logprobs`, one for each prompt token.
    """
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    entries = []
    for token_id, entry in zip(prompt_ids, logprobs, strict=True):
        entries.append(_token_text(tokenizer, token_id, entry, detokenizer.num_chars))
        detokenizer.push((token_id,))
    return entries


def _token_text(
    tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs | None, offset: int
) -> TokenText:
    text, data = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    if entry is None:
        return TokenText(token_id, text, data, offset, None, None, ())
    top = tuple(
        TopToken(i, tokenizer.token_text(i), tokenizer.token_bytes(i), logprob)
        for i, logprob in entry.top
    )
    return TokenText(token_id, text, data, offset, entry.logprob, entry.rank, top)

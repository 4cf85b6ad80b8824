"""Token ids to text, piece by piece: never half a character, never part of a stop string.

Knows tokens and text, no engine and no events: those are `TextStream`'s. Invariant: the pieces
joined are `Tokenizer.decode` of all the ids, cut at the first stop string, however the ids were
grouped into calls.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from penstock.text.stop import stop_strings
from penstock.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one answer, as it grows.

    Args:
        skip_special_tokens: special tokens have no text.
        stop: the text ends where the first of these is complete (see `StopStrings`).
        include_stop_str_in_output: the text keeps the stop string that ended it.
        min_tokens: a stop string complete within that many tokens is text like any other.
        prompt_ids: what came before, if the answer continues it: then a SentencePiece token's
            leading space is kept. Empty for an answer that stands alone.

    Attributes:
        stopped: the stop string that ended the text, None before.
        num_chars: characters decoded so far, those held back included, a part of one not.
    """

    __slots__ = (
        "stopped",
        "num_chars",
        "_tokenizer",
        "_hidden",
        "_utf8",
        "_stops",
        "_state",
        "_held",
        "_include_stop",
        "_num_exempt",
        "_drop_space",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.stopped: str | None = None
        self.num_chars = 0
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = _Utf8Decoder("replace")
        self._stops = stop_strings(stop) if stop else None
        self._state = 0  # of _stops
        self._held = ""  # the last num_held(_state) characters
        self._include_stop = include_stop_str_in_output
        self._num_exempt = min_tokens if stop else 0
        self._drop_space = tokenizer.drops_leading_space and not any(
            tokenizer.token_bytes(i) for i in prompt_ids if i not in self._hidden
        )

    def push(self, ids: Sequence[int]) -> str:
        """Take tokens; return the text that is now certain. After a stop string: nothing."""
        if self.stopped is not None:
            return ""
        if not self._num_exempt:
            return self._emit(self._decode(ids), match=True)
        num_exempt = min(self._num_exempt, len(ids))
        self._num_exempt -= num_exempt
        text = self._emit(self._decode(ids[:num_exempt]), match=False)
        return text + self._emit(self._decode(ids[num_exempt:]), match=True)

    def flush(self) -> str:
        """End the text; return what was held back. A half character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        rest = self._utf8.decode(b"", final=True)
        self.num_chars += len(rest)
        text = self._emit(rest, match=not self._num_exempt)
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        token_bytes, hidden = self._tokenizer.token_bytes, self._hidden
        data = b"".join([token_bytes(i) for i in ids if i not in hidden])
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        text = self._utf8.decode(data)
        self.num_chars += len(text)
        return text

    def _emit(self, new: str, *, match: bool) -> str:
        if self._stops is None or not new:
            return new
        num_before = len(self._held)
        text = self._held + new
        self._state, found = self._stops.advance(self._state, new, match=match)
        if found is not None:
            self.stopped, self._held = found.stop, ""
            end = num_before + found.end
            return text[: end if self._include_stop else end - len(found.stop)]
        cut = len(text) - self._stops.num_held(self._state)
        self._held = text[cut:]
        return text[:cut]
